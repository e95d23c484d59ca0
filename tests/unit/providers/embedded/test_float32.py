"""The float32 twin of a model file: the same tensors, the same metadata, no rounding."""

import stat
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize
from gguf.quants import quantize

from headgate.config import demo_model_path
from headgate.providers.embedded import native
from headgate.providers.embedded.float32 import Undequantised, dequantise

KINDS = (
    GGMLQuantizationType.F32,
    GGMLQuantizationType.F16,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q8_0,
)


def model_of_all_kinds(path: Path, *, parts: int = 0, scaled: bool = False, learned: bool = False) -> Path:
    """Tensors of every kind, of sizes that need padding, with integers among them."""
    values = np.random.default_rng(5)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    if parts:
        writer.add_uint16("split.count", parts)
    if scaled:
        writer.add_float32("llama.rope.scaling.factor", 2.0)
    if learned:
        writer.add_tensor("position_embd.weight", np.zeros((64, 32), np.float32))
    for kind in KINDS:
        weights = values.standard_normal((7, 96)).astype(np.float32)
        writer.add_tensor(kind.name, quantize(weights, kind), raw_dtype=kind)
    writer.add_tensor("I32", np.arange(5, dtype=np.int32))
    writer.add_tensor("last", np.arange(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def twin_of(source: Path, folder: Path, context: int = 0) -> Path:
    target = folder / "twin.gguf"
    dequantise(native.library(), str(source), str(target), context)
    return target


def field(path: Path, name: str) -> object:
    return GGUFReader(path).fields[name].contents()


def test_every_tensor_with_a_float_form_becomes_exactly_that(tmp_path: Path) -> None:
    source = model_of_all_kinds(tmp_path / "mixed.gguf")
    twin = {tensor.name: tensor for tensor in GGUFReader(twin_of(source, tmp_path)).tensors}
    stored = GGUFReader(source).tensors
    assert len(twin) == len(stored) == len(KINDS) + 2
    for tensor in stored:
        if tensor.name == "I32":
            assert twin["I32"].tensor_type == GGMLQuantizationType.I32
            assert twin["I32"].data.tolist() == [0, 1, 2, 3, 4]
        else:
            assert twin[tensor.name].tensor_type == GGMLQuantizationType.F32
            assert np.array_equal(twin[tensor.name].data, dequantize(tensor.data, tensor.tensor_type))


def test_the_metadata_stays_but_for_the_kind_of_file(tmp_path: Path) -> None:
    source = demo_model_path()
    before, after = GGUFReader(source).fields, GGUFReader(twin_of(source, tmp_path)).fields
    differing = {name for name in before if before[name].contents() != after[name].contents()}
    assert before.keys() == after.keys()
    assert differing == {"general.file_type"}


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    assert stat.S_IMODE(twin_of(demo_model_path(), tmp_path).stat().st_mode) == 0o600


def test_a_file_that_is_already_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "twin.gguf").write_text("mine")
    with pytest.raises(FileExistsError):
        twin_of(demo_model_path(), tmp_path)
    assert (tmp_path / "twin.gguf").read_text() == "mine"


@pytest.mark.parametrize("context", [32, 100])
def test_it_claims_the_context_it_will_be_used_with(tmp_path: Path, context: int) -> None:
    twin = twin_of(model_of_all_kinds(tmp_path / "mixed.gguf"), tmp_path, context)
    assert field(twin, "llama.context_length") == max(64, context)


@pytest.mark.parametrize("hindrance", ["scaled", "learned"])
def test_a_context_that_other_things_depend_on_is_kept(tmp_path: Path, hindrance: str) -> None:
    source = model_of_all_kinds(
        tmp_path / "mixed.gguf", scaled=hindrance == "scaled", learned=hindrance == "learned"
    )
    assert field(twin_of(source, tmp_path, 100), "llama.context_length") == 64


def test_a_model_in_several_parts_has_none(tmp_path: Path) -> None:
    with pytest.raises(Undequantised, match="several parts"):
        twin_of(model_of_all_kinds(tmp_path / "mixed.gguf", parts=2), tmp_path)


@pytest.mark.parametrize("length", [0, 3, 1_000, 500_000])
def test_a_file_that_is_cut_off_has_none(tmp_path: Path, length: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo_model_path().read_bytes()[:length])
    with pytest.raises(Undequantised):
        twin_of(cut, tmp_path)
