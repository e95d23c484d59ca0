"""One choice whose job asks for log probabilities or for its prompt, piece by piece as it arrives.

An upstream that ignores either would answer something else than was asked, so what comes is checked against the
prompt. A blocking answer is one single piece: both ways give the same text and the same entries.
"""

from bisect import bisect_left
from itertools import pairwise

import msgspec

from headgate.core.completion import Chunk, FinishReason, Job, TokenLogprob
from headgate.core.errors import UpstreamFailed
from headgate.providers import openai_logprobs_wire as logprobs_wire

SURPLUS_ENTRIES = 1024
"""Entries beyond the prompt's and the limit on tokens: start and end tokens, stops that are cut from the text."""


def is_checked(job: Job) -> bool:
    """Whether there is more to a choice than its text. Some upstreams make a token even where none is asked for."""
    return job.echo or job.logprobs is not None or not job.max_tokens


class CheckedChoice:
    """Makes chunks of one choice's pieces.

    A chat upstream cannot echo, so there the prompt is put first here. The last entry is held back while it is
    ahead of the text: only the end of the choice shows whether it is the end token.
    """

    __slots__ = (
        "_asked",
        "_characters",
        "_count",
        "_data_bytes",
        "_held",
        "_index",
        "_job",
        "_most",
        "_of_prompt",
        "_placed",
        "_preface",
        "_prompt",
        "_prompt_bytes",
        "_prompt_ids",
        "_prompt_left",
        "_prompt_seen",
        "_provider",
        "_starts_unscored",
        "_text_bytes",
    )

    def __init__(self, provider: str, job: Job, index: int) -> None:
        prompt = job.prompt if job.echo and isinstance(job.prompt, str) else ""
        echoes = job.shape == "completion"
        self._provider = provider
        self._job = job
        self._index = index
        self._asked = job.logprobs is not None
        self._preface = "" if echoes else prompt
        self._prompt = prompt if echoes else ""
        self._prompt_bytes = len(self._prompt.encode())
        self._prompt_ids = len(job.prompt) if job.echo and isinstance(job.prompt, tuple) else 0
        self._prompt_seen = 0
        self._prompt_left = self._prompt_bytes
        self._text_bytes = 0
        self._data_bytes = 0
        self._characters = 0
        self._count = 0
        self._placed = True
        self._of_prompt = 0
        self._starts_unscored = False
        self._held: tuple[TokenLogprob, ...] = ()
        self._most = SURPLUS_ENTRIES + job.max_tokens + self._prompt_bytes + self._prompt_ids

    def take(self, text: str, logprobs: msgspec.Raw, finish: FinishReason | None) -> list[Chunk]:
        """The chunks of one piece; with `finish` the choice is over.

        UpstreamFailed where the upstream did not do what the job asks for.
        """
        ours: FinishReason | None = None
        if finish is not None:
            ours = finish if self._job.max_tokens else "length"
        whole = text
        echoed, text = self._split(whole)
        self._text_bytes += len(whole.encode())
        entries = self._entries(whole, logprobs, ours) if self._asked else ()
        border = self._border(entries)
        if text and self._asked and self._prompt_left > 0 and not self._placed:
            raise self._unscored_prompt()
        if ours is not None:
            self._check_whole()
        if not self._job.max_tokens and not self._prompt_ids:
            text, entries = "", entries[:border]  # nothing but the prompt was asked for
        chunks = []
        if self._preface and (text or ours is not None):
            chunks.append(Chunk(self._index, self._preface, tokens=0, echoed=True))
            self._preface = ""
        if echoed or border:
            of_prompt = entries[:border] or None
            chunks.append(Chunk(self._index, echoed, tokens=0, logprobs=of_prompt, echoed=True))
        generated = entries[border:] or None
        if text or generated or ours is not None:
            chunks.append(Chunk(self._index, text, ours, logprobs=generated))
        return chunks

    def _split(self, text: str) -> tuple[str, str]:
        """The part of the piece that is the prompt, and what is generated."""
        if self._prompt_seen == len(self._prompt) or not text:
            return "", text
        expected = self._prompt[self._prompt_seen : self._prompt_seen + len(text)]
        if not text.startswith(expected):
            raise self._ignored_echo()
        self._prompt_seen += len(expected)
        return expected, text[len(expected) :]

    def _entries(
        self, text: str, logprobs: msgspec.Raw, finish: FinishReason | None
    ) -> tuple[TokenLogprob, ...]:
        """The entries to give with this piece."""
        given = logprobs_wire.entries(self._provider, logprobs, self._job.logprobs or 0, self._most)
        if given and not self._count:
            given = (self._first(given[0]), *given[1:])
        given = self._in_place(text, given, logprobs)
        self._count += len(given)
        self._data_bytes += sum(len(entry.data) for entry in given)
        if self._count > self._most:
            raise UpstreamFailed(f"The provider {self._provider} gave more log probabilities than tokens.")
        if self._text_bytes and not self._count:
            raise UpstreamFailed(
                f"The provider {self._provider} gave no log probabilities; "
                "the model's row can say that it has none (logprobs = false)."
            )
        entries = self._held + given
        self._held = ()
        if not entries:
            return ()
        last = entries[-1]
        ahead = self._data_bytes - self._text_bytes
        if finish is None and (ahead > 0 or not last.data):
            self._held = entries[-1:]
            return entries[:-1]
        if finish == "stop" and (ahead == len(last.data) or not last.data):
            self._data_bytes -= len(last.data)
            return (*entries[:-1], TokenLogprob(b"", last.logprob, last.top, end=True))
        return entries

    def _in_place(
        self, text: str, given: tuple[TokenLogprob, ...], logprobs: msgspec.Raw
    ) -> tuple[TokenLogprob, ...]:
        """The entries with the bytes that stand in the text where their tokens lack its blanks.

        The upstream's offsets are believed for as long as those of each piece begin where its text does and every
        token fits what stands in its place; otherwise bytes are counted.
        """
        start, end = self._characters, self._characters + len(text)
        self._characters = end
        if not self._placed or not (text or given):
            return given
        places = logprobs_wire.offsets(logprobs, len(given))
        self._placed = places is not None and places[0] == start
        if places is None or not self._placed:
            return given
        spans = [text[first - start : last - start] for first, last in pairwise((*places, end))]
        self._placed = all(map(_fits, given, spans, [last >= end for last in (*places[1:], end)]))
        if not self._placed:
            return given
        self._of_prompt += bisect_left(places, len(self._prompt))
        found = tuple(map(_as_written, given, spans))
        if text:
            # All before its end is accounted for, however long the tokens are that stand for parts of characters.
            within = found[: bisect_left(places, end)]
            self._data_bytes = self._text_bytes - sum(len(entry.data) for entry in within)
        return found

    def _first(self, entry: TokenLogprob) -> TokenLogprob:
        """Some upstreams score a start token that is not in the text: it has no bytes there."""
        self._starts_unscored = entry.logprob is None
        looks_special = self._prompt and entry.data[:1] in (b"<", b"[")
        if self._starts_unscored and looks_special and not self._prompt.encode().startswith(entry.data):
            return TokenLogprob(b"", None, None)
        return entry

    def _border(self, entries: tuple[TokenLogprob, ...]) -> int:
        """How many of these entries are the prompt's: one that reaches beyond it is."""
        if self._placed:
            border = min(self._of_prompt, len(entries))
            self._of_prompt -= border
            self._prompt_left -= sum(len(entry.data) for entry in entries[:border])
            return border
        for position, entry in enumerate(entries):
            if self._prompt_left <= 0:
                return position
            self._prompt_left -= len(entry.data)
        return len(entries)

    def _check_whole(self) -> None:
        """At the end: was the prompt echoed, and scored where that was asked for?

        Only a prompt's first token goes without a score; else there must be more entries than the completion has.
        """
        if self._prompt_seen < len(self._prompt):
            raise self._ignored_echo()
        if not self._asked:
            return
        scored = True
        if self._prompt and not self._placed:
            completion = self._text_bytes - self._prompt_bytes
            scored = self._prompt_left <= 0 and (self._starts_unscored or self._data_bytes > completion)
        elif self._prompt_ids:
            completion = self._job.max_tokens + 1
            scored = self._count >= self._prompt_ids and (self._starts_unscored or self._count > completion)
        if not scored:
            raise self._unscored_prompt()

    def _ignored_echo(self) -> UpstreamFailed:
        return UpstreamFailed(f"The provider {self._provider} ignored echo.")

    def _unscored_prompt(self) -> UpstreamFailed:
        return UpstreamFailed(f"The provider {self._provider} gave no log probabilities for the prompt.")


def _fits(entry: TokenLogprob, span: str, is_last: bool) -> bool:
    """Whether a token may stand for this part of the text, blanks aside.

    Part of a character, or U+FFFD in its place, says nothing. What reaches the end of the text may have been cut there.
    """
    try:
        token = entry.data.decode()
    except UnicodeDecodeError:
        return True
    if token == span or "\ufffd" in token:
        return True
    token, span = _without_blanks(token), _without_blanks(span)
    return token.startswith(span) if is_last else token == span


def _as_written(entry: TokenLogprob, span: str) -> TokenLogprob:
    """The entry with the blanks that the text has around its token, among the alternatives too."""
    data = entry.data
    written = span.encode()
    if written == data or _without_blanks(span).encode() != b"".join(data.split()):
        return entry
    top = entry.top and tuple((written if other == data else other, score) for other, score in entry.top)
    return TokenLogprob(written, entry.logprob, top, entry.end)


def _without_blanks(text: str) -> str:
    return "".join(text.split())
