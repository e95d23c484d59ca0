"""What llama.cpp's own server lacks, asked at the engine's second socket: the vocabulary, the bytes of tokens, scores
of given tokens.

Bytes travel as latin-1 text there. EngineGone and EngineRefusal pass through, as from the engine itself.
"""

from collections.abc import Iterable, Sequence

import msgspec
from msgspec import Struct

from headgate.core.errors import UpstreamFailed
from headgate.providers.embedded.client import EngineRefusal
from headgate.providers.embedded.tokenizer import Post, TokenIds

ASKED_AT_ONCE = 4096
KNOWN_PIECES = 1 << 18
LONGEST_PIECE = 4096
_BAD_INPUT = 400
_NOT_BUILT = 501

Alternatives = tuple[tuple[int, float], ...]


class Vocabulary(Struct, frozen=True, kw_only=True):
    """Its size, and the ids of the tokens with a meaning of their own; -1 where the model has none."""

    size: int
    start: int
    end: int
    adds_start: bool
    infill_prefix: int
    infill_suffix: int
    infill_middle: int

    @property
    def infills(self) -> bool:
        return min(self.infill_prefix, self.infill_suffix, self.infill_middle) >= 0


class Scores(Struct, frozen=True, kw_only=True):
    """One log probability, and the most likely ids with theirs, for each scored token.

    `pieces` are the bytes of every id that occurs.
    """

    logprobs: tuple[float, ...]
    top: tuple[Alternatives, ...]
    pieces: dict[int, bytes]


class Recovered(Struct, frozen=True, kw_only=True):
    """Tokens that were found again, and their scores."""

    ids: TokenIds
    scores: Scores


class _Scored(Struct, frozen=True):
    logprobs: tuple[float, ...]
    top: tuple[Alternatives, ...]
    pieces: dict[int, str]
    ids: TokenIds = ()


class _Pieces(Struct, frozen=True):
    pieces: tuple[str, ...]


class _Said(Struct, frozen=True):
    error: str = ""


class SideDoor:
    """A client of one engine's side door. What never changes while a model is loaded is asked once."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._vocabulary: Vocabulary | None = None
        self._pieces: dict[int, bytes] = {}

    async def vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            # A model may name many ends, but not thousands.
            self._vocabulary = msgspec.json.decode(
                await self._ask("/vocabulary", {}, 64 * 1024), type=Vocabulary
            )
        return self._vocabulary

    async def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """Each token's bytes, a special token's name. The ids must be of the vocabulary."""
        wanted = tuple(ids)
        # What is known is taken before anything is awaited: others may forget it meanwhile.
        found = {token: self._pieces[token] for token in wanted if token in self._pieces}
        unknown = [*dict.fromkeys(token for token in wanted if token not in found)]
        for first in range(0, len(unknown), ASKED_AT_ONCE):
            some = unknown[first : first + ASKED_AT_ONCE]
            said = await self._ask("/pieces", {"ids": some}, LONGEST_PIECE * (1 + len(some)))
            pieces = msgspec.json.decode(said, type=_Pieces).pieces
            found.update(zip(some, (piece.encode("latin-1") for piece in pieces), strict=True))
        result = [found[token] for token in wanted]
        if len(self._pieces) + len(found) > KNOWN_PIECES:
            self._pieces.clear()
        self._pieces.update(found)
        return result

    async def score(self, ids: TokenIds, top: int, first: int, end: int) -> Scores:
        """The log probabilities of ids[first:end], each given all before it, with `top` alternatives.

        The very first id has none.
        """
        body = {"ids": ids, "from": first, "to": end, "top": top}
        wanted = end - max(1, first)
        said = msgspec.json.decode(await self._ask("/score", body, _answer_size(wanted, top)), type=_Scored)
        scores = _scores(said)
        if len(scores.logprobs) != wanted or len(scores.top) != wanted:
            raise UpstreamFailed("The embedded engine scored another number of tokens.")
        return scores

    async def recover(self, ids: Sequence[int], text: bytes, count: int, top: int) -> Recovered | None:
        """Which `count` tokens of these bytes followed `ids`, scored; None when there are none."""
        body = {"ids": ids, "text": text.decode("latin-1"), "count": count, "top": top}
        try:
            said = msgspec.json.decode(
                await self._ask("/recover", body, _answer_size(count, top)), type=_Scored
            )
        except EngineRefusal as refusal:
            if refusal.status == _BAD_INPUT:
                return None
            raise
        return Recovered(ids=said.ids, scores=_scores(said))

    async def _ask(self, path: str, body: object, most: int) -> bytes:
        try:
            return await self._post(path, msgspec.json.encode(body), most)
        except EngineRefusal as refusal:
            if refusal.status != _NOT_BUILT:
                raise
            raise UpstreamFailed(
                f"The embedded engine cannot do this on this machine: {_reason(refusal)}"
            ) from refusal


def _scores(said: _Scored) -> Scores:
    return Scores(
        logprobs=said.logprobs,
        top=said.top,
        pieces={token: piece.encode("latin-1") for token, piece in said.pieces.items()},
    )


def _answer_size(tokens: int, top: int) -> int:
    """A generous bound: some sixty bytes for each number with its id, and the pieces."""
    return 32 * 1024 * 1024 + 64 * (top + 2) * tokens


def _reason(refusal: EngineRefusal) -> str:
    try:
        said = msgspec.json.decode(refusal.body, type=_Said).error
    except (msgspec.MsgspecError, UnicodeDecodeError):
        said = ""
    return (said or "no reason given")[:300]
