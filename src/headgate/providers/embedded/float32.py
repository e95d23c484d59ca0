"""A model file with all its weights as 32-bit floats: the same model, computed without the engine's shortcuts.

With quantised weights llama.cpp quantises what flows through them too, and with 16-bit floats it rounds; with
32-bit weights its log probabilities are those of the file to 1e-5.
"""

import ctypes
import os
from ctypes import CDLL
from typing import BinaryIO

from headgate.providers.embedded import native
from headgate.providers.embedded.native import F32, STRING, UINT16, UINT32

BLOCKS_AT_ONCE = 1 << 14


class Undequantised(Exception):
    """The file has no such twin; the text says why."""


def dequantise(library: CDLL, source: str, target: str, context: int = 0) -> None:
    """Write the model file `source` to the new file `target`, every tensor that has a float32 form in that form.

    The server gives no slot more than the context a model was trained with, not even the room for the last bytes of a
    character; where it is safe the copy claims `context` tokens.

    Undequantised for files that are not whole or in several parts; OSError. `target` is left half done then.
    """
    file = library.gguf_init_from_file(os.fsencode(source), native.FileParams(True, None))
    if not file:
        raise Undequantised("it is not a whole GGUF file")
    try:
        if _parts(library, file) > 1:
            raise Undequantised("it is in several parts")
        # Nobody else may read what only its owner may read.
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        tensors = [_Tensor(library, file, number) for number in range(library.gguf_get_n_tensors(file))]
        start, alignment = library.gguf_get_data_offset(file), library.gguf_get_alignment(file)
        for tensor in tensors:
            if tensor.to_float is not None:
                library.gguf_set_tensor_type(file, tensor.name, F32)
        library.gguf_set_val_u32(file, b"general.file_type", F32)
        _widen(library, file, context)
        if not library.gguf_write_to_file(file, os.fsencode(target), True):
            raise Undequantised("its copy cannot be written")
    finally:
        library.gguf_free(file)
    with open(source, "rb") as stored, open(target, "ab") as floats:  # noqa: PTH123  # pathlib: not here
        for tensor in tensors:
            stored.seek(start + tensor.offset)
            size = tensor.copy(stored, floats)
            floats.write(bytes(-size % alignment))


class _Tensor:
    """Where a tensor's bytes are, and how they become floats; `to_float` is None where they stay as they are."""

    def __init__(self, library: CDLL, file: int, number: int) -> None:
        self.name: bytes = library.gguf_get_tensor_name(file, number)
        self.offset: int = library.gguf_get_tensor_offset(file, number)
        self._size: int = library.gguf_get_tensor_size(file, number)
        kind = library.gguf_get_tensor_type(file, number)
        traits = library.ggml_get_type_traits(kind).contents
        self._block: int = traits.blck_size
        self._block_bytes: int = traits.type_size
        # ggml's function of quantised and short floats; integers have none, and float32 needs none.
        self.to_float = traits.to_float if kind != F32 and traits.to_float else None

    def copy(self, stored: BinaryIO, floats: BinaryIO) -> int:
        """Returns the bytes written."""
        written = 0
        rest = self._size
        while rest:
            piece = stored.read(min(rest, BLOCKS_AT_ONCE * self._block_bytes))
            if not piece or len(piece) % self._block_bytes:
                raise Undequantised("it ends in the middle")
            rest -= len(piece)
            if self.to_float is not None:
                count = len(piece) // self._block_bytes * self._block
                values = (ctypes.c_float * count)()
                self.to_float(
                    ctypes.cast(ctypes.c_char_p(piece), ctypes.c_void_p), ctypes.addressof(values), count
                )
                piece = bytes(values)
            written += floats.write(piece)
        return written


def _parts(library: CDLL, file: int) -> int:
    key = library.gguf_find_key(file, b"split.count")
    if key < 0 or library.gguf_get_kv_type(file, key) != UINT16:
        return 1
    return int(library.gguf_get_val_u16(file, key))


def _widen(library: CDLL, file: int, context: int) -> None:
    """Raise the context length, unless something else in the file depends on it: positions that were learned one by
    one, or rotations that are stretched."""
    name = library.gguf_find_key(file, b"general.architecture")
    if name < 0 or library.gguf_get_kv_type(file, name) != STRING:
        return
    architecture: bytes = library.gguf_get_val_str(file, name)
    length = library.gguf_find_key(file, architecture + b".context_length")
    if length < 0 or library.gguf_get_kv_type(file, length) != UINT32:
        return
    depends = library.gguf_find_tensor(file, b"position_embd.weight") >= 0 or any(
        library.gguf_get_key(file, key).startswith(architecture + b".rope.scaling.")
        for key in range(library.gguf_get_n_kv(file))
    )
    if not depends and library.gguf_get_val_u32(file, length) < context:
        library.gguf_set_val_u32(file, architecture + b".context_length", context)
