"""The binding to llama.cpp's C interface recognises the library it was written for, and no other."""

import _ctypes
import ctypes

import pytest
import xllamacpp.xllamacpp

from headgate.providers.embedded import native


def test_the_installed_library_is_the_known_one() -> None:
    params = native.library().llama_context_default_params()
    assert (params.n_ctx, params.n_batch, params.type_k) == (512, 2048, 1)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (_ctypes.__file__, "the installed xllamacpp does not offer llama_backend_init"),
        ("/nowhere/library.so", "the installed xllamacpp cannot be loaded"),
        (__file__, "the installed xllamacpp cannot be loaded"),
    ],
)
def test_a_library_without_the_functions_is_unavailable_with_a_reason(
    file: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xllamacpp.xllamacpp, "__file__", file)
    with pytest.raises(native.NativeUnavailable) as caught:
        native.library()
    assert str(caught.value) == reason


def test_a_library_with_another_layout_is_unavailable_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shifted(ctypes.Structure):
        """The same fields behind one more than the library has."""

        _fields_ = (("added", ctypes.c_uint32), *native.ContextParams._fields_)

    functions = {**native._FUNCTIONS, "llama_context_default_params": (Shifted,)}
    monkeypatch.setattr(native, "_FUNCTIONS", functions)
    with pytest.raises(native.NativeUnavailable, match="context parameters in an unknown way"):
        native.library()
