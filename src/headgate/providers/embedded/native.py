"""llama.cpp's C interface, bound by ctypes to the library that xllamacpp carries. For the engine process alone.

xllamacpp exposes llama.cpp's server and not its C interface, but exports the symbols. The version is pinned; still,
nothing is called before its layout has been recognised by the values that its defaults are known to have.
"""

import ctypes as c
from collections.abc import Mapping
from typing import Any

Pointer = c.c_void_p
F32 = 0
"""The number of ggml's 32-bit float type."""

UINT16, UINT32, STRING = 2, 4, 8
"""The numbers of these types in GGUF."""

FLASH_ATTENTION_OFF = 0


class NativeUnavailable(Exception):
    """The library cannot be used; the text says why, in words fit for clients."""


class ModelParams(c.Structure):
    """llama_model_params, as far as it is used."""

    _fields_ = (
        ("_pointers", c.c_uint8 * 16),
        ("n_gpu_layers", c.c_int32),
        ("_split_mode", c.c_int32),
        ("_between", c.c_uint8 * 48),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("_rest", c.c_uint8 * 421),
    )


class ContextParams(c.Structure):
    """llama_context_params, as far as it is used."""

    _fields_ = (
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("_before_threads", c.c_uint32 * 3),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("_before_attention", c.c_uint32 * 4),
        ("flash_attn_type", c.c_int32),
        ("_before_types", c.c_uint32 * 12),
        ("type_k", c.c_int32),
        ("type_v", c.c_int32),
        ("_before_switches", c.c_uint8 * 24),
        ("embeddings", c.c_bool),
        ("offload_kqv", c.c_bool),
        ("no_perf", c.c_bool),
        ("op_offload", c.c_bool),
        ("swa_full", c.c_bool),
        ("kv_unified", c.c_bool),
        ("_rest", c.c_uint8 * 370),
    )


class Batch(c.Structure):
    """llama_batch."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", Pointer),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


class FileParams(c.Structure):
    """gguf_init_params."""

    _fields_ = (("no_alloc", c.c_bool), ("ctx", Pointer))


class TypeTraits(c.Structure):
    """ggml_type_traits."""

    _fields_ = (
        ("type_name", c.c_char_p),
        ("blck_size", c.c_int64),
        ("blck_size_interleave", c.c_int64),
        ("type_size", c.c_size_t),
        ("is_quantized", c.c_bool),
        ("to_float", c.CFUNCTYPE(None, Pointer, Pointer, c.c_int64)),
        ("from_float_ref", Pointer),
    )


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    # name: result, arguments
    "llama_backend_init": (None,),
    "llama_model_default_params": (ModelParams,),
    "llama_context_default_params": (ContextParams,),
    "llama_model_load_from_file": (Pointer, c.c_char_p, ModelParams),
    "llama_model_free": (None, Pointer),
    "llama_model_get_vocab": (Pointer, Pointer),
    "llama_model_has_encoder": (c.c_bool, Pointer),
    "llama_model_has_decoder": (c.c_bool, Pointer),
    "llama_model_is_diffusion": (c.c_bool, Pointer),
    "llama_init_from_model": (Pointer, Pointer, ContextParams),
    "llama_free": (None, Pointer),
    "llama_vocab_n_tokens": (c.c_int32, Pointer),
    "llama_vocab_bos": (c.c_int32, Pointer),
    "llama_vocab_eos": (c.c_int32, Pointer),
    "llama_vocab_fim_pre": (c.c_int32, Pointer),
    "llama_vocab_fim_suf": (c.c_int32, Pointer),
    "llama_vocab_fim_mid": (c.c_int32, Pointer),
    "llama_vocab_get_add_bos": (c.c_bool, Pointer),
    "llama_token_to_piece": (c.c_int32, Pointer, c.c_int32, c.c_char_p, c.c_int32, c.c_int32, c.c_bool),
    "llama_batch_get_one": (Batch, c.POINTER(c.c_int32), c.c_int32),
    "llama_batch_init": (Batch, c.c_int32, c.c_int32, c.c_int32),
    "llama_decode": (c.c_int32, Pointer, Batch),
    "llama_get_logits_ith": (c.POINTER(c.c_float), Pointer, c.c_int32),
    "llama_get_memory": (Pointer, Pointer),
    "llama_memory_clear": (None, Pointer, c.c_bool),
    "llama_memory_seq_rm": (c.c_bool, Pointer, c.c_int32, c.c_int32, c.c_int32),
    "llama_memory_seq_cp": (None, Pointer, c.c_int32, c.c_int32, c.c_int32, c.c_int32),
    "gguf_init_from_file": (Pointer, c.c_char_p, FileParams),
    "gguf_free": (None, Pointer),
    "gguf_find_key": (c.c_int64, Pointer, c.c_char_p),
    "gguf_get_kv_type": (c.c_int, Pointer, c.c_int64),
    "gguf_get_n_kv": (c.c_int64, Pointer),
    "gguf_get_key": (c.c_char_p, Pointer, c.c_int64),
    "gguf_get_val_u16": (c.c_uint16, Pointer, c.c_int64),
    "gguf_get_val_u32": (c.c_uint32, Pointer, c.c_int64),
    "gguf_get_val_str": (c.c_char_p, Pointer, c.c_int64),
    "gguf_set_val_u32": (None, Pointer, c.c_char_p, c.c_uint32),
    "gguf_find_tensor": (c.c_int64, Pointer, c.c_char_p),
    "gguf_get_n_tensors": (c.c_int64, Pointer),
    "gguf_get_tensor_name": (c.c_char_p, Pointer, c.c_int64),
    "gguf_get_tensor_type": (c.c_int, Pointer, c.c_int64),
    "gguf_get_tensor_offset": (c.c_size_t, Pointer, c.c_int64),
    "gguf_get_tensor_size": (c.c_size_t, Pointer, c.c_int64),
    "gguf_set_tensor_type": (None, Pointer, c.c_char_p, c.c_int),
    "gguf_get_data_offset": (c.c_size_t, Pointer),
    "gguf_get_alignment": (c.c_size_t, Pointer),
    "gguf_write_to_file": (c.c_bool, Pointer, c.c_char_p, c.c_bool),
    "ggml_get_type_traits": (c.POINTER(TypeTraits), c.c_int),
}


Declarations = Mapping[str, tuple[Any, ...]]
"""By a function's name: its result's type and its arguments' types."""


def library() -> c.CDLL:
    """llama.cpp with its functions declared, its layout checked. NativeUnavailable where it cannot be used."""
    bound = bind(_FUNCTIONS)
    _recognise(bound)
    return bound


def bind(functions: Declarations) -> c.CDLL:
    """xllamacpp's library with these functions declared. NativeUnavailable where it lacks one."""
    try:
        import xllamacpp.xllamacpp  # late: the largest part of the engine's start

        bound = c.CDLL(xllamacpp.xllamacpp.__file__)
    except (ImportError, OSError) as error:
        raise NativeUnavailable("the installed xllamacpp cannot be loaded") from error
    for name, (result, *arguments) in functions.items():
        try:
            function = getattr(bound, name)
        except AttributeError as error:
            raise NativeUnavailable(f"the installed xllamacpp does not offer {name}") from error
        function.restype = result
        function.argtypes = arguments
    return bound


def _recognise(bound: c.CDLL) -> None:
    model = bound.llama_model_default_params()
    context = bound.llama_context_default_params()
    tokens = (c.c_int32 * 3)(1, 2, 3)
    batch = bound.llama_batch_get_one(tokens, 3)
    floats = bound.ggml_get_type_traits(F32).contents
    recognised = {
        "model parameters": (
            model.n_gpu_layers,
            model._split_mode,
            model.vocab_only,
            model.check_tensors,
            model.use_extra_bufts,
        )
        == (-1, 1, False, False, True),
        "context parameters": (
            (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max) == (512, 2048, 512, 1)
            and (context.flash_attn_type, context.type_k, context.type_v) == (-1, 1, 1)
            and (context.embeddings, context.offload_kqv, context.no_perf, context.op_offload)
            == (False, True, True, True)
            and (context.swa_full, context.kv_unified) == (True, False)
        ),
        "batches": batch.n_tokens == 3
        and c.addressof(tokens) == c.cast(batch.token, Pointer).value
        and not (batch.embd or batch.pos or batch.n_seq_id or batch.seq_id or batch.logits),
        "type traits": (floats.type_name, floats.blck_size, floats.type_size, floats.is_quantized)
        == (b"f32", 1, 4, False),
    }
    unknown = [name for name, known in recognised.items() if not known]
    if unknown:
        raise NativeUnavailable(f"the installed xllamacpp lays out {' and '.join(unknown)} in an unknown way")
