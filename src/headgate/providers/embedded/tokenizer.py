"""From a job to token ids, exactly as the engine will see them.

Tokenizing and chat templates run in the child: a template is code from a model file. Words of users never become
special tokens there: the template is rendered around unguessable marks, and where a special token's text touches
what a user wrote, that message is tokenized apart, as plain text.
"""

import re
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence

import msgspec
from msgspec import Struct

from headgate.core.completion import Job, Message
from headgate.core.errors import InvalidRequest
from headgate.providers.embedded.client import EngineRefusal
from headgate.providers.embedded.gguf import ModelFile

Post = Callable[[str, bytes, int], Awaitable[bytes]]
"""POST a body to the child: path, body, the most bytes of answer."""

TokenIds = tuple[int, ...]


class _TokenizeRequest(Struct, frozen=True, kw_only=True):
    content: str
    add_special: bool
    parse_special: bool


class _Tokens(Struct, frozen=True):
    tokens: TokenIds


class _Text(Struct, frozen=True):
    content: str


class _Rendered(Struct, frozen=True):
    prompt: str


class _Conversation(Struct, frozen=True):
    messages: Sequence[Message]


class Segment(Struct, frozen=True, gc=False):
    """A stretch of a prompt. In a `plain` one special tokens are only text."""

    text: str
    plain: bool


class Tokenizer:
    """Token ids of prompts and conversations for one model file."""

    def __init__(self, model: ModelFile, context: int, post: Post) -> None:
        self._post = post
        self._context = context
        self._start = model.start_token
        self._longest = model.longest_token
        self._special_texts = tuple(text for _, text in model.specials)
        self._special_ids = frozenset(index for index, _ in model.specials)

    async def encode(self, job: Job) -> TokenIds:
        """The prompt's ids, BOS as the model wants it, at least one. InvalidRequest for what cannot fit."""
        if job.messages is not None:
            segments = await self._conversation(job.messages, job)
        elif job.shape == "chat":
            segments = await self._conversation((Message(role="user", content=_text(job)),), job)
        else:
            prompt = _text(job)
            self.refuse_hopeless((prompt,), job)
            segments = (Segment(prompt, job.plain),)
        ids: TokenIds = ()
        for index, segment in enumerate(segments):
            ids += await self.tokenize(segment, special=index == 0)
        return ids or (self._start,)

    async def tokenize(self, segment: Segment, *, special: bool) -> TokenIds:
        """The segment's ids; `special`: with the tokens that the model wants around a text."""
        if not segment.text and not special:
            return ()
        body = msgspec.json.encode(
            _TokenizeRequest(content=segment.text, add_special=special, parse_special=not segment.plain)
        )
        # Per byte of text at most one token of at most ten digits and a comma.
        reply = await self._post("/tokenize", body, 1024 + 11 * len(body))
        return msgspec.json.decode(reply, type=_Tokens).tokens

    def refuse_hopeless(self, contents: Sequence[str], job: Job) -> None:
        """Refuse what is too long for the context even in longest tokens: tokenizing it is expensive."""
        if not self._longest:
            return
        size = sum(map(len, contents))
        if size > self._context:
            size = sum(len(content.encode()) for content in contents)
        least = -(-size // self._longest)
        if least > self._context:
            raise InvalidRequest(
                f"The prompt has at least {least} tokens; the model {job.model.name} takes at most {self._context}.",
                param="prompt" if job.messages is None else "messages",
                code="context_length_exceeded",
                allowed=f"at most {self._context} tokens",
            )

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids: without special tokens and without half a character at the end."""
        wanted = [token for token in ids if token not in self._special_ids]
        if not wanted:
            return ""
        body = msgspec.json.encode(_Tokens(tuple(wanted)))
        reply = await self._post("/detokenize", body, 1024 * (len(wanted) + 16))
        return msgspec.json.decode(reply, type=_Text).content.rstrip("\ufffd")

    async def _conversation(self, messages: tuple[Message, ...], job: Job) -> tuple[Segment, ...]:
        contents = [message.content for message in messages]
        self.refuse_hopeless(contents, job)
        mark = secrets.token_hex(16)
        # A tab on both sides shows whether the template trims what it inserts.
        marked = [
            Message(role=message.role, content=f"\t{mark}m{index}x\t")
            for index, message in enumerate(messages)
        ]
        try:
            reply = await self._post(
                "/apply-template",
                msgspec.json.encode(_Conversation(marked)),
                1024 * 1024 + 1024 * len(messages),
            )
        except EngineRefusal as refusal:
            raise InvalidRequest(
                f"The chat template of the model {job.model.name} does not take this sequence of messages.",
                param="messages",
            ) from refusal
        rendered = msgspec.json.decode(reply, type=_Rendered).prompt
        return tuple(self._segments(re.split(f"(\t?){mark}m(\\d+)x(\t?)", rendered), contents))

    def _segments(self, pieces: list[str], contents: Sequence[str]) -> Iterator[Segment]:
        """Template and contents in order, split only around contents that a special token's text touches.

        Splitting less keeps the tokens as they were in training: words may merge over the borders.
        """
        parts = [pieces[0]]
        inserted = [False]
        for left, index, right, template in zip(*(iter(pieces[1:]),) * 4, strict=True):
            content = contents[int(index)]
            content = content if left else content.lstrip()
            parts += (content if right else content.rstrip(), template)
            inserted += (True, False)
        text = "".join(parts)
        touched = self._special_spans(text)
        position = 0
        parsed = ""
        for part, is_content in zip(parts, inserted, strict=True):
            end = position + len(part)
            if is_content and any(start < end and stop > position for start, stop in touched):
                yield Segment(parsed, plain=False)
                yield Segment(part, plain=True)
                parsed = ""
            else:
                parsed += part
            position = end
        yield Segment(parsed, plain=False)

    def _special_spans(self, text: str) -> list[tuple[int, int]]:
        """Wherever a special token's text occurs, overlapping ones too."""
        spans: list[tuple[int, int]] = []
        for special in self._special_texts:
            start = text.find(special)
            while start >= 0:
                spans.append((start, start + len(special)))
                start = text.find(special, start + 1)
        return spans


def _text(job: Job) -> str:
    assert not isinstance(job.prompt, tuple)  # noqa: S101  # ids are not tokenized
    return job.prompt or ""
