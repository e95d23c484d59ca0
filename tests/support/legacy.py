"""What must be true of every completion choice, whatever was asked: for tests of the legacy contract."""

import re
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec import Struct
from openai.types import Completion, CompletionChoice

ENGINE_NOISE = 1e-4
"""How far the same log probability may lie apart when its batch had another shape."""


class Arrays(Struct, frozen=True):
    """The legacy `logprobs` object; lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def since(self, entry: int) -> "Arrays":
        return Arrays(
            self.tokens[entry:],
            self.token_logprobs[entry:],
            self.top_logprobs[entry:],
            self.text_offset[entry:],
        )


class Merged(Struct, frozen=True):
    """One choice, whole or put together from a stream's chunks."""

    text: str
    arrays: Arrays | None
    finish_reason: str | None


def arrays_of(choice: CompletionChoice) -> Arrays | None:
    found: Any = choice.logprobs
    if found is None:
        return None
    arrays = Arrays(found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset)
    lengths = {
        len(arrays.tokens),
        len(arrays.token_logprobs),
        len(arrays.top_logprobs),
        len(arrays.text_offset),
    }
    assert len(lengths) == 1, lengths
    return arrays


def whole(completion: Completion) -> list[Merged]:
    assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
    return [Merged(choice.text, arrays_of(choice), choice.finish_reason) for choice in completion.choices]


def merged(chunks: Sequence[Completion], count: int) -> list[Merged]:
    """The stream's choices; each chunk must hold one piece of one choice, and nothing may follow its end."""
    found = []
    for index in range(count):
        pieces = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        reasons: list[str | None] = [piece.finish_reason for piece in pieces]
        assert set(reasons[:-1]) <= {None}, reasons
        parts = [arrays for arrays in map(arrays_of, pieces) if arrays is not None]
        joined = None
        if parts:
            joined = Arrays([], [], [], [])
            for part in parts:
                joined.tokens.extend(part.tokens)
                joined.token_logprobs.extend(part.token_logprobs)
                joined.top_logprobs.extend(part.top_logprobs)
                joined.text_offset.extend(part.text_offset)
        found.append(Merged("".join(piece.text for piece in pieces), joined, reasons[-1]))
    assert {choice.index for chunk in chunks for choice in chunk.choices} == set(range(count))
    return found


def bytes_of(tokens: Sequence[str]) -> bytes:
    """What tokens as they are shown stand for."""
    return b"".join(
        bytes(int(byte, 16) for byte in re.findall(r"\\x([0-9a-f]{2})", token))
        if token.startswith("bytes:")
        else token.encode()
        for token in tokens
    )


def assert_choice(
    choice: Merged, *, prompt: str, prompt_tokens: int, echo: bool, logprobs: int | None, most: int
) -> int | None:
    """Check one choice by itself; returns how many tokens were generated, None where it cannot be told."""
    said = choice.text
    if echo:
        assert choice.text.startswith(prompt)
        said = choice.text[len(prompt) :]
    assert choice.finish_reason in ("stop", "length")
    if most == 0:
        assert (said, choice.finish_reason) == ("", "length")
    if logprobs is None:
        assert choice.arrays is None
        return most if choice.finish_reason == "length" else None
    arrays = choice.arrays
    assert arrays is not None
    leading = prompt_tokens if echo else 0
    generated = len(arrays.tokens) - leading
    assert 0 <= generated <= most
    if choice.finish_reason == "length":
        assert generated == most
    # What is no text is shown as U+FFFD; how many of them end a text that stops within a character is no matter.
    told = bytes_of(arrays.tokens[leading:]).decode(errors="replace")
    assert told.rstrip("\ufffd") == said.rstrip("\ufffd")
    if echo:
        assert bytes_of(arrays.tokens[:leading]) == prompt.encode()
        assert (arrays.token_logprobs[0], arrays.top_logprobs[0]) == (None, None)
    _assert_scores(arrays.since(1 if echo else 0), logprobs)
    _assert_offsets(arrays, choice.text)
    return generated


def _assert_scores(arrays: Arrays, logprobs: int) -> None:
    for token, value, top in zip(arrays.tokens, arrays.token_logprobs, arrays.top_logprobs, strict=True):
        assert value is not None
        assert value <= 0
        assert top is not None
        if logprobs == 0:
            assert list(top.values()) == [value]
            continue
        assert logprobs <= len(top) <= logprobs + 1, (token, top)
        assert value in top.values(), "the token itself is always among them"
        assert all(other <= 0 for other in top.values())


def _assert_offsets(arrays: Arrays, text: str) -> None:
    assert arrays.text_offset == sorted(arrays.text_offset)
    for token, offset in zip(arrays.tokens, arrays.text_offset, strict=True):
        assert 0 <= offset <= len(text)
        if not token.startswith("bytes:"):
            assert text[offset : offset + len(token)] == token


def assert_same(one: Merged, other: Merged) -> None:
    """Equal in everything; log probabilities within the engine's noise."""
    assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
    if one.arrays is None or other.arrays is None:
        assert one.arrays is other.arrays is None
        return
    assert one.arrays.tokens == other.arrays.tokens
    assert one.arrays.text_offset == other.arrays.text_offset
    for mine, theirs in zip(one.arrays.token_logprobs, other.arrays.token_logprobs, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine == pytest.approx(theirs, abs=ENGINE_NOISE)
    for top, others in zip(one.arrays.top_logprobs, other.arrays.top_logprobs, strict=True):
        assert top == (None if others is None else pytest.approx(others, abs=ENGINE_NOISE))
