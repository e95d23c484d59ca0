"""The four formats of upstreams, each able to say the same things: what a fault is made of.

All report the same usage where they report any: `PROMPT` tokens, `CACHED` of them from a cache, and the output asked
for. Nothing here knows what a gateway makes of it.
"""

import json
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from tests.support import anthropic_upstream as anthropic
from tests.support import cohere_upstream as cohere

PROMPT, CACHED = 7, 3
MODEL = "plain"
WORDS_OF_AN_ERROR = "Told to fail."

FormatName = Literal["completions", "chat", "anthropic", "cohere"]


class Wire:
    """One format. Everything streamed is whole events.

    `kind` and `mode` are a provider's and a model's in headgate.toml, `path` is asked below the base URL `root`.
    `tells_prompt`: a stream says at its beginning what the prompt came to.
    """

    name: ClassVar[FormatName]
    kind: ClassVar[str]
    mode: ClassVar[str]
    root: ClassVar[str]
    tells_prompt: ClassVar[bool] = False

    def opening(self, *, usage: bool = True) -> bytes:
        """What stands before the first text."""
        raise NotImplementedError

    def piece(self, text: str) -> bytes:
        raise NotImplementedError

    def counted(self, text: str, completion: int) -> bytes:
        """A piece of text with the usage so far."""
        raise NotImplementedError

    def ending(self, completion: int | None) -> bytes:
        """All that comes after the text; None: without usage."""
        raise NotImplementedError

    def half_ending(self, completion: int | None) -> bytes:
        """The reason to stop, and not the format's last word."""
        raise NotImplementedError

    def error_event(self, status: int = 500) -> bytes:
        raise NotImplementedError

    def answer(self, text: str, completion: int | None) -> bytes:
        """A blocking answer."""
        raise NotImplementedError

    def error_body(self, status: int = 500, words: str = WORDS_OF_AN_ERROR) -> bytes:
        raise NotImplementedError


class _OpenAI(Wire):
    kind = "openai"
    root = "/v1"

    def choice(self, text: str, finish: str | None, *, stream: bool) -> dict[str, Any]:
        raise NotImplementedError

    def head(self, *, stream: bool) -> dict[str, Any]:
        raise NotImplementedError

    def usage(self, completion: int) -> dict[str, Any]:
        return {
            "prompt_tokens": PROMPT,
            "completion_tokens": completion,
            "total_tokens": PROMPT + completion,
            "prompt_tokens_details": {"cached_tokens": CACHED},
        }

    def event(self, *choices: Mapping[str, Any], **more: Any) -> bytes:
        return data(self.head(stream=True) | {"choices": choices} | more)

    def piece(self, text: str) -> bytes:
        return self.event(self.choice(text, None, stream=True))

    def counted(self, text: str, completion: int) -> bytes:
        return self.event(self.choice(text, None, stream=True), usage=self.usage(completion))

    def half_ending(self, completion: int | None) -> bytes:
        last = self.event(self.choice("", "stop", stream=True))
        return last if completion is None else last + self.event(usage=self.usage(completion))

    def ending(self, completion: int | None) -> bytes:
        return self.half_ending(completion) + b"data: [DONE]\n\n"

    def error_event(self, status: int = 500) -> bytes:
        return b"data: " + self.error_body(status) + b"\n\n"

    def answer(self, text: str, completion: int | None) -> bytes:
        said = self.head(stream=False) | {"choices": [self.choice(text, "stop", stream=False)]}
        return encoded(said | ({} if completion is None else {"usage": self.usage(completion)}))

    def error_body(self, status: int = 500, words: str = WORDS_OF_AN_ERROR) -> bytes:
        return encoded({"error": {"message": words, "type": "server_error", "param": None, "code": status}})


class Completions(_OpenAI):
    name = "completions"
    mode = "completion"

    def head(self, *, stream: bool) -> dict[str, Any]:
        return {"id": "cmpl-7", "object": "text_completion", "created": 1, "model": MODEL}

    def choice(self, text: str, finish: str | None, *, stream: bool) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}

    def opening(self, *, usage: bool = True) -> bytes:
        return b""


class Chat(_OpenAI):
    name = "chat"
    mode = "chat"

    def head(self, *, stream: bool) -> dict[str, Any]:
        kind = "chat.completion.chunk" if stream else "chat.completion"
        return {"id": "chatcmpl-7", "object": kind, "created": 1, "model": MODEL}

    def choice(self, text: str, finish: str | None, *, stream: bool) -> dict[str, Any]:
        content = {"content": text} if text or not stream else {}
        said = {"delta": content} if stream else {"message": {"role": "assistant", **content}}
        return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

    def opening(self, *, usage: bool = True) -> bytes:
        role = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self.event(role)


_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    429: "rate_limit_error",
    529: "overloaded_error",
}


class Anthropic(Wire):
    name = "anthropic"
    kind = "anthropic"
    mode = "chat"
    root = "/v1"
    tells_prompt = True

    def usage(self, completion: int) -> dict[str, Any]:
        return {
            "input_tokens": PROMPT - CACHED - 1,
            "cache_creation_input_tokens": 1,
            "cache_read_input_tokens": CACHED,
            "output_tokens": completion,
        }

    def opening(self, *, usage: bool = True) -> bytes:
        counts = self.usage(1) if usage else None
        block = anthropic.opened(0, anthropic.text_block(""))
        return anthropic.events(anthropic.start(MODEL, counts), block, anthropic.PING).encode()

    def piece(self, text: str) -> bytes:
        return anthropic.events(anthropic.piece(0, text)).encode()

    def counted(self, text: str, completion: int) -> bytes:
        so_far = anthropic.ending(None, self.usage(completion))
        return anthropic.events(anthropic.piece(0, text), so_far).encode()

    def half_ending(self, completion: int | None) -> bytes:
        counts = None if completion is None else self.usage(completion)
        return anthropic.events(anthropic.closed(0), anthropic.ending("end_turn", counts)).encode()

    def ending(self, completion: int | None) -> bytes:
        return self.half_ending(completion) + anthropic.events(anthropic.STOP).encode()

    def error_event(self, status: int = 500) -> bytes:
        return anthropic.events(anthropic.error(_ERROR_TYPES.get(status, "api_error"))).encode()

    def answer(self, text: str, completion: int | None) -> bytes:
        counts = None if completion is None else self.usage(completion)
        return encoded(anthropic.message(anthropic.text_block(text), model=MODEL, usage=counts))

    def error_body(self, status: int = 500, words: str = WORDS_OF_AN_ERROR) -> bytes:
        return encoded(anthropic.error(_ERROR_TYPES.get(status, "api_error"), words))


class Cohere(Wire):
    name = "cohere"
    kind = "cohere"
    mode = "chat"
    root = "/v2"

    def usage(self, completion: int | None) -> dict[str, Any] | None:
        return None if completion is None else cohere.counts(PROMPT, completion, cached_tokens=CACHED)

    def opening(self, *, usage: bool = True) -> bytes:
        return cohere.message_start() + cohere.content_start("text")

    def piece(self, text: str) -> bytes:
        return cohere.delta(text)

    def half_ending(self, completion: int | None) -> bytes:
        closed = cohere.sse({"type": "content-end", "index": 0})
        return closed + cohere.message_end("COMPLETE", self.usage(completion))

    def ending(self, completion: int | None) -> bytes:
        return self.half_ending(completion) + b"data: [DONE]\n\n"

    def error_event(self, status: int = 500) -> bytes:
        return cohere.message_end("ERROR", error=WORDS_OF_AN_ERROR)

    def answer(self, text: str, completion: int | None) -> bytes:
        message = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        said = {"id": "88492c0b-8227-4256-9b88-1ac956f43de5", "message": message, "finish_reason": "COMPLETE"}
        return encoded(said | ({} if completion is None else {"usage": self.usage(completion)}))

    def error_body(self, status: int = 500, words: str = WORDS_OF_AN_ERROR) -> bytes:
        return encoded({"id": "88492c0b-8227-4256-9b88-1ac956f43de5", "message": words})


WIRES: tuple[Wire, ...] = (Completions(), Chat(), Anthropic(), Cohere())


def encoded(content: Any) -> bytes:
    """JSON with its characters as they are, so that they can be cut in their middle."""
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()


def data(content: Mapping[str, Any]) -> bytes:
    return b"data: " + encoded(content) + b"\n\n"
