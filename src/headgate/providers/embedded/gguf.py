"""Reads what the gateway must know of a GGUF model file, without trusting the file.

Only the metadata block is walked, by length checks; the chat template is noted, never evaluated.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import mmap
import os
import struct
from functools import lru_cache
from pathlib import Path

from msgspec import Struct

MAGIC = b"GGUF"
MAX_KEYS = 100_000
MAX_ELEMENTS = 20_000_000
MAX_KEY_BYTES = 65_535
MAX_TEXT_BYTES = 1 << 20
REMEMBERED_FILES = 16
MAX_CONTEXT = 1 << 28
MAX_DEPTH = 2

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_LENGTH = _NUMBERS[10]
_HEADER = struct.Struct("<4sIQQ")
_ELEMENTS_HEADER = struct.Struct("<IQ")

# Token types that are parsed as special tokens only on request: unknown and control.
_SPECIAL_TYPES = (2, 3)

_ARCHITECTURE = "general.architecture"
_CHAT_TEMPLATE = "tokenizer.chat_template"
_TOKENS = "tokenizer.ggml.tokens"
_TOKEN_TYPES = "tokenizer.ggml.token_type"

Value = int | float | bool | str


class BrokenModel(Exception):
    """The file cannot be a model. `reason` is fit for operators and clients: it holds no path."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ModelFile(Struct, frozen=True, kw_only=True):
    """A GGUF's metadata. `context_length` in tokens; `specials` are (id, text) of the control tokens;
    `longest_token` is the most UTF-8 bytes of prompt that a single token can stand for (0: unknown)."""

    context_length: int
    has_chat_template: bool
    bos_id: int | None
    eos_id: int | None
    specials: tuple[tuple[int, str], ...]
    longest_token: int

    @property
    def start_token(self) -> int:
        """What an empty prompt begins with: BOS, or EOS where the model has no BOS."""
        if self.bos_id is not None:
            return self.bos_id
        return self.eos_id if self.eos_id is not None else 0


def read_gguf(path: str | os.PathLike[str]) -> ModelFile:
    """The model's metadata. BrokenModel when the file is missing, short, not GGUF, or absurd.

    Catalogue and provider both ask: a file is read once, and again when it has changed.
    """
    try:
        state = Path(path).stat()
        return _read(os.fspath(path), state.st_ino, state.st_size, state.st_mtime_ns)
    except FileNotFoundError:
        raise BrokenModel("the model file does not exist") from None
    except OSError as error:
        raise BrokenModel(f"the model file cannot be read: {error.strerror}") from None


@lru_cache(REMEMBERED_FILES)
def _read(path: str, *_state: int) -> ModelFile:
    """Read the file at `path`; the rest is what changes when the file does."""
    with Path(path).open("rb") as file:
        if os.fstat(file.fileno()).st_size < _HEADER.size:
            raise BrokenModel("the model file is too short to be a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(content).read()


class _Reader:
    """One walk over the metadata. Every length is checked against the file before it is used."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._size = len(content)
        self._at = 0
        self._values: dict[str, Value] = {}
        self._tokens: list[bytes] = []
        self._token_types: tuple[int, ...] = ()

    def read(self) -> ModelFile:
        magic, version, tensors, keys = _HEADER.unpack_from(self._content)
        if magic != MAGIC:
            raise BrokenModel("the model file is not a GGUF file")
        if version not in (2, 3):
            raise BrokenModel(f"the model file has GGUF version {version}; versions 2 and 3 are supported")
        if keys > MAX_KEYS:
            raise BrokenModel(f"the model file claims {keys} metadata keys")
        self._at = _HEADER.size
        for _ in range(keys):
            key = self._string(MAX_KEY_BYTES).decode("utf-8", "replace")
            self._value(key, self._number(4))
        model = self._model()
        self._check_tensors(tensors)
        return model

    def _model(self) -> ModelFile:
        architecture = self._values.get(_ARCHITECTURE)
        if not isinstance(architecture, str) or not architecture:
            raise BrokenModel("the model file does not name its architecture")
        context = self._values.get(f"{architecture}.context_length")
        if type(context) is not int or not 1 <= context <= MAX_CONTEXT:
            raise BrokenModel(f"the model file gives no usable context length ({context!r})")
        if not self._tokens:
            raise BrokenModel("the model file holds no vocabulary")
        template = self._values.get(_CHAT_TEMPLATE)
        return ModelFile(
            context_length=context,
            has_chat_template=isinstance(template, str) and bool(template.strip()),
            bos_id=self._token_id("bos"),
            eos_id=self._token_id("eos"),
            specials=tuple(
                (index, self._tokens[index].decode("utf-8", "replace"))
                for index, kind in enumerate(self._token_types[: len(self._tokens)])
                if kind in _SPECIAL_TYPES and self._tokens[index]
            ),
            longest_token=max(map(len, self._tokens)),
        )

    def _check_tensors(self, count: int) -> None:
        """A file that was cut short, as by a broken download, does not reach the beginning of its last tensor."""
        last = 0
        for _ in range(count):
            self._skip_string()
            dimensions = self._number(4)
            self._at += 8 * dimensions + 4  # their sizes, and the tensor's type
            last = max(last, self._number(10))
        if count and self._at + last >= self._size:
            raise BrokenModel("the model file is incomplete: it ends before its last tensor")

    def _token_id(self, which: str) -> int | None:
        value = self._values.get(f"tokenizer.ggml.{which}_token_id")
        return value if type(value) is int and 0 <= value < len(self._tokens) else None

    def _value(self, key: str, kind: int) -> None:
        if kind == _STRING:
            if key in (_ARCHITECTURE, _CHAT_TEMPLATE):
                self._values[key] = self._string(MAX_TEXT_BYTES).decode("utf-8", "replace")
            else:
                self._skip_string()
        elif kind == _ARRAY:
            self._elements(key)
        else:
            self._values[key] = self._number(kind)

    def _elements(self, key: str, depth: int = 1) -> None:
        """An array: the tokens and their types are kept, all else is stepped over."""
        self._need(_ELEMENTS_HEADER.size)
        kind, count = _ELEMENTS_HEADER.unpack_from(self._content, self._at)
        self._at += _ELEMENTS_HEADER.size
        if count > MAX_ELEMENTS:
            raise BrokenModel(f"the model file claims {count} elements in {key[:100]!r}")
        if kind == _STRING:
            if key == _TOKENS:
                self._tokens = [self._string(MAX_KEY_BYTES) for _ in range(count)]
            else:
                for _ in range(count):
                    self._skip_string()
        elif kind == _ARRAY:
            if depth >= MAX_DEPTH:
                raise BrokenModel(f"the model file nests arrays too deeply in {key[:100]!r}")
            for _ in range(count):
                self._elements("", depth + 1)
        else:
            number = self._layout(kind)
            self._need(number.size * count)
            if key == _TOKEN_TYPES and kind in (4, 5):
                self._token_types = struct.unpack_from(f"<{count}i", self._content, self._at)
            self._at += number.size * count

    def _number(self, kind: int) -> int:
        layout = self._layout(kind)
        self._need(layout.size)
        (value,) = layout.unpack_from(self._content, self._at)
        self._at += layout.size
        return value  # type: ignore[no-any-return]  # struct does not know; floats and bools pass as numbers

    def _layout(self, kind: int) -> struct.Struct:
        layout = _NUMBERS.get(kind)
        if layout is None:
            raise BrokenModel(f"the model file holds a value of unknown type {kind}")
        return layout

    def _string(self, most: int) -> bytes:
        start, end = self._skip_string()
        if end - start > most:
            raise BrokenModel(f"the model file holds a key, token or text of {end - start} bytes")
        return self._content[start:end]

    def _skip_string(self) -> tuple[int, int]:
        """Step over a string; where it begins and ends."""
        if self._at + 8 > self._size:
            raise BrokenModel("the model file ends within its metadata")
        (length,) = _LENGTH.unpack_from(self._content, self._at)
        start = self._at + 8
        end = start + length
        if end > self._size:
            raise BrokenModel("the model file ends within its metadata")
        self._at = end
        return start, end

    def _need(self, size: int) -> None:
        if self._at + size > self._size:
            raise BrokenModel("the model file ends within its metadata")
