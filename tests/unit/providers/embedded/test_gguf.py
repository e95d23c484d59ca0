"""What is read from a GGUF file, and how files that are not one are refused."""

import struct
import tracemalloc
from collections.abc import Mapping
from pathlib import Path

import pytest

from headgate.config import demo_model_path
from headgate.providers.embedded.gguf import MAX_TEXT_BYTES, BrokenModel, read_gguf


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def value(content: object) -> bytes:
    """A typed GGUF value: str or bytes, int (u32), list of str, or list of int (i32)."""
    if isinstance(content, str | bytes):
        return struct.pack("<I", 8) + string(content)
    if isinstance(content, int):
        return struct.pack("<II", 4, content)
    if isinstance(content, list) and content and isinstance(content[0], int):
        return struct.pack("<IIQ", 9, 5, len(content)) + struct.pack(f"<{len(content)}i", *content)
    assert isinstance(content, list)
    return struct.pack("<IIQ", 9, 8, len(content)) + b"".join(string(item) for item in content)


def gguf(keys: Mapping[str, object], *, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    head = magic + struct.pack("<IQQ", version, 0, len(keys))
    return head + b"".join(string(key) + value(content) for key, content in keys.items())


GOOD: Mapping[str, object] = {
    "general.architecture": "llama",
    "llama.context_length": 2048,
    "tokenizer.ggml.tokens": ["<s>", "</s>", "hello", " world"],
    "tokenizer.ggml.token_type": [3, 3, 1, 1],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_the_bundled_model_is_understood() -> None:
    model = read_gguf(demo_model_path())
    assert model.context_length >= 512
    assert model.has_chat_template
    assert model.bos_id is not None and model.eos_id is not None
    assert "<|im_end|>" in {text for _, text in model.specials}
    assert model.longest_token >= len("<|endoftext|>")


def test_limits_vocabulary_and_special_tokens_are_read(path: Path) -> None:
    path.write_bytes(gguf(GOOD))
    model = read_gguf(path)
    assert (model.context_length, model.longest_token) == (2048, 6)
    assert model.specials == ((0, "<s>"), (1, "</s>"))
    assert (model.bos_id, model.eos_id, model.start_token) == (0, 1, 0)


def test_a_model_without_bos_starts_with_eos(path: Path) -> None:
    path.write_bytes(gguf({key: held for key, held in GOOD.items() if "bos" not in key}))
    assert read_gguf(path).start_token == 1


def test_a_model_without_a_chat_template_says_so(path: Path) -> None:
    path.write_bytes(gguf({key: held for key, held in GOOD.items() if "template" not in key}))
    assert not read_gguf(path).has_chat_template


def test_every_cut_of_a_good_file_is_broken_and_none_raises_anything_else(path: Path) -> None:
    whole = gguf(GOOD)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BrokenModel):
            read_gguf(path)


@pytest.mark.parametrize("missing", ["half of it", "all tensors", "a tensor's description"])
def test_a_model_cut_short_among_its_tensors_is_broken(path: Path, missing: str) -> None:
    whole = demo_model_path().read_bytes()
    names = whole.rindex(b".weight")
    length = {"half of it": len(whole) // 2, "all tensors": names + 32, "a tensor's description": names}
    path.write_bytes(whole[: length[missing]])
    with pytest.raises(BrokenModel, match=r"incomplete|ends within"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "too short"),
        (gguf(GOOD, magic=b"GGML"), "not a GGUF file"),
        (gguf(GOOD, version=1), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "metadata keys"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**63) + b"x" * 64, "ends within"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<I", 99) + b"x" * 64, "type 99"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 8, 2**40),
            "elements",
        ),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("k") + struct.pack("<IIQ", 9, 9, 1)
            + struct.pack("<IQ", 9, 1) * 50,
            "too deeply",
        ),
        (gguf({}), "architecture"),
        (gguf({**GOOD, "llama.context_length": 0}), "context length"),
        (gguf({**GOOD, "llama.context_length": 2**31}), "context length"),
        (gguf({**GOOD, "llama.context_length": "long"}), "context length"),
        (gguf({**GOOD, "tokenizer.ggml.tokens": []}), "vocabulary"),
    ],
)  # fmt: skip
def test_absurd_files_are_broken_with_a_reason(path: Path, content: bytes, reason: str) -> None:
    path.write_bytes(content)
    with pytest.raises(BrokenModel) as caught:
        read_gguf(path)
    assert reason in caught.value.reason
    assert str(path.parent) not in caught.value.reason


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("general.architecture", "a" * (MAX_TEXT_BYTES + 1)),
        ("tokenizer.chat_template", "a" * (MAX_TEXT_BYTES + 1)),
        ("tokenizer.ggml.tokens", ["a" * (MAX_TEXT_BYTES + 1)]),
    ],
)
def test_texts_that_are_needed_have_a_longest_length(path: Path, key: str, content: object) -> None:
    path.write_bytes(gguf({**GOOD, key: content}))
    with pytest.raises(BrokenModel, match=f"{MAX_TEXT_BYTES + 1} bytes"):
        read_gguf(path)


@pytest.mark.parametrize("content", ["a" * 8_000_000, ["a" * 16] * 300_000], ids=["text", "array"])
def test_what_is_not_needed_is_stepped_over_and_takes_no_memory(path: Path, content: object) -> None:
    path.write_bytes(gguf({"general.unneeded": content, **GOOD}))
    tracemalloc.start()
    try:
        model = read_gguf(path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert model.context_length == 2048
    assert most < 1_000_000


def test_a_file_is_read_once_and_again_when_it_has_changed(path: Path) -> None:
    path.write_bytes(gguf(GOOD))
    model = read_gguf(path)
    assert read_gguf(str(path)) is model
    path.write_bytes(gguf({**GOOD, "llama.context_length": 4096, "general.name": "newer"}))
    assert read_gguf(path).context_length == 4096


def test_missing_files_and_folders_are_broken(tmp_path: Path) -> None:
    with pytest.raises(BrokenModel, match="does not exist"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(BrokenModel, match="cannot be read"):
        read_gguf(tmp_path)
