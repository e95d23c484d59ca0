"""What the scripted upstream says, and how it fails: one Script per request, played by an Answer."""

import asyncio
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct
from tests.support.scores import chat_scores, legacy_scores

if TYPE_CHECKING:
    from tests.support.upstream import Connection, Received


class Script(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one request is answered. The defaults answer properly; k counts chunks of text, all choices' together.

    `pieces`: the text, a piece per chunk (None: an echo of the prompt). With n > 1 each choice begins with its
    number and a colon. `usage`: "count" words, "none", or the object to report. `hold_at`: wait for
    `up.release()` before the answer (0) or after k chunks. `pause_s`: between chunks. `block`: all events of a
    stream in one write. `status`, `headers`, `body`: answer with exactly this instead (a str or bytes goes as
    it is). `silent`: never answer. `error_at`: an `{"error": …}` event after k chunks. `reset_at`, `close_at`:
    after k chunks half an event, then a reset or an orderly close; a blocking answer breaks off in its middle,
    and `reset_at` 0 answers nothing at all. `raw`: exactly these bytes, then a close. `done`: whether `[DONE]` is sent.
    `finish` None: no finish reasons. `then_close`: close the connection after the answer.

    Log probabilities are given where they are asked for, a piece counting as a token: `tokens` says which pieces
    come to other tokens, as written in `logprobs`. `end_token` is one more, without text, at the end. `scores`:
    this object instead, in every choice and event. `echo` is honoured for completions, a word per chunk;
    `crosses`: the last word of the prompt and the first piece come as one chunk. `ignores`: which of "echo" and
    "logprobs" the upstream knows nothing of.
    """

    pieces: tuple[str, ...] | None = None
    finish: str | None = "stop"
    usage: dict[str, Any] | Literal["count", "none"] = "count"
    hold_at: int | None = None
    pause_s: float = 0.0
    block: bool = False
    status: int = 200
    headers: dict[str, str] = {}
    body: dict[str, Any] | str | None = None
    silent: bool = False
    error_at: int | None = None
    error: dict[str, Any] | str = "The model fell over."
    reset_at: int | None = None
    close_at: int | None = None
    done: bool = True
    then_close: bool = False
    raw: str | None = None
    tokens: Mapping[str, tuple[str, ...]] = {}
    end_token: str | None = None
    scores: Any = None
    crosses: bool = False
    ignores: tuple[str, ...] = ()


_WORD = re.compile(r"\s*\S+|\s+$")
WORDS = ("alpha", " beta", " gamma", " delta")

NAMED: Mapping[str, Script] = {
    "held": Script(pieces=WORDS, hold_at=0),
    "held-after-2": Script(pieces=WORDS, hold_at=2),
    "slow": Script(pieces=tuple(f" w{i:02}" for i in range(100)), pause_s=0.05),
    "silent": Script(silent=True),
    "no-usage": Script(pieces=WORDS, usage="none"),
    "zero-usage": Script(pieces=WORDS, usage={"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}),
    "error-event": Script(pieces=WORDS, error_at=2),
    "error-200": Script(body={"error": {"message": "Out of order.", "code": 503}}),
    "reset": Script(pieces=WORDS, reset_at=2),
    "reset-at-once": Script(reset_at=0),
    "cut": Script(pieces=WORDS, close_at=2),
    "no-done": Script(pieces=WORDS, done=False),
}


def script_named(model: str) -> Script:
    """What an upstream model's name alone asks for."""
    if model.startswith("status-"):
        status = int(model.removeprefix("status-"))
        return Script(status=status, body={"error": {"message": f"Told to say {status}.", "code": None}})
    return NAMED.get(model, Script())


class Answer:
    """One script being played."""

    def __init__(
        self, connection: "Connection", received: "Received", script: Script, released: asyncio.Event
    ) -> None:
        self.connection = connection
        self.received = received
        self.script = script
        self.released = released
        asked = received.json if isinstance(received.json, dict) else {}
        self.chat = received.path.endswith("/chat/completions")
        self.stream = bool(asked.get("stream"))
        self.include_usage = bool((asked.get("stream_options") or {}).get("include_usage"))
        self.n = int(asked.get("n") or 1)
        self.candidates = int(asked.get("best_of") or self.n)
        prompt = asked.get("prompt", "")
        if isinstance(prompt, list):
            prompt = " ".join(f"t{token}" for token in prompt)
        messages = asked.get("messages") or [{"content": prompt}]
        self.words = [word for message in messages for word in str(message.get("content")).split()]
        last = str(messages[-1].get("content"))
        echo = ("echo:", *(f" {word}" for word in last.split()))
        self.pieces = script.pieces if script.pieces is not None else echo
        self.nothing = asked.get("max_tokens") == 0
        if self.nothing:
            self.pieces = ()
        self.echoed: list[str] = []
        if asked.get("echo") and not self.chat and "echo" not in script.ignores:
            self.echoed = _WORD.findall(prompt)
        self.alternatives: int | None = None
        wanted = asked.get("logprobs")
        if wanted is not None and wanted is not False and "logprobs" not in script.ignores:
            self.alternatives = int((asked.get("top_logprobs") or 0) if self.chat else wanted)

    async def give(self) -> None:
        script = self.script
        if script.silent:
            await asyncio.Event().wait()
        await self.held(0)
        if script.raw is not None:
            self.connection.transport.write(script.raw.encode())
            self.connection.transport.close()
            return
        if script.body is not None or script.status != 200:
            self.whole(script.status, script.body if script.body is not None else "")
        elif script.reset_at == 0:
            self.connection.reset()
            return
        elif self.stream:
            if not await self.streamed():
                return
        elif script.reset_at is None and script.close_at is None:
            self.whole(200, self.blocking())
        else:
            await self.half()
            return
        self.received.answered.set()
        if script.then_close:
            self.connection.transport.close()
        else:
            self.connection.next_request()

    async def held(self, k: int) -> None:
        if self.script.hold_at == k:
            await self.released.wait()

    def whole(self, status: int, body: dict[str, Any] | str) -> None:
        sent = body if isinstance(body, str) else json.dumps(body)
        self.connection.send_response(status, self.script.headers, sent.encode())

    async def half(self) -> None:
        body = json.dumps(self.blocking()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self.connection.send_head(200, headers | self.script.headers)
        self.connection.transport.write(body[: len(body) // 2])
        await self.break_off()

    async def break_off(self) -> None:
        await asyncio.sleep(0.05)  # so that what was sent is read before the connection goes
        if self.script.reset_at is None:
            self.connection.transport.close()
        else:
            self.connection.reset()

    def usage(self) -> dict[str, Any] | None:
        if self.script.usage == "none":
            return None
        if self.script.usage == "count":
            prompt, completion = max(len(self.words), 1), len(self.pieces) * self.candidates
            return {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": 0},
            }
        return self.script.usage

    def pieces_of(self, index: int) -> tuple[str, ...]:
        if self.n == 1 or self.nothing:
            return self.pieces
        first, *others = self.pieces or ("",)
        return (f"{index}:{first}", *others)

    def head(self) -> dict[str, Any]:
        if self.chat:
            kind = "chat.completion.chunk" if self.stream else "chat.completion"
            return {"id": "chatcmpl-scripted", "object": kind, "created": 1, "model": self.received.model}
        return {
            "id": "cmpl-scripted",
            "object": "text_completion",
            "created": 1,
            "model": self.received.model,
        }

    def chunks_of(self, index: int) -> list[tuple[str, ...]]:
        """The pieces of a choice, its echoed prompt among them, as they come together."""
        chunks: list[tuple[str, ...]] = [(piece,) for piece in (*self.echoed, *self.pieces_of(index))]
        if self.script.crosses and 0 < len(self.echoed) < len(chunks):
            border = len(self.echoed)
            chunks[border - 1 : border + 1] = [chunks[border - 1] + chunks[border]]
        return chunks

    def scores(self, pieces: Sequence[str], *, first: bool, end: bool) -> Any:
        """The log probabilities of these pieces' tokens; `first` is the choice's, `end` its end token as well."""
        if self.alternatives is None or self.script.scores is not None:
            return self.script.scores
        tokens = [token for piece in pieces for token in self.script.tokens.get(piece, (piece,))]
        if end and self.script.end_token is not None:
            tokens.append(self.script.end_token)
        written = chat_scores if self.chat else legacy_scores
        return written(tokens, self.alternatives, unscored=1 if first and self.echoed else 0)

    def blocking(self) -> dict[str, Any]:
        choices = []
        for index in range(self.n):
            pieces = [piece for chunk in self.chunks_of(index) for piece in chunk]
            text = "".join(pieces)
            content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            scores = self.scores(pieces, first=True, end=True)
            choices.append(
                {"index": index, **content, "logprobs": scores, "finish_reason": self.script.finish}
            )
        usage = self.usage()
        return self.head() | {"choices": choices} | ({} if usage is None else {"usage": usage})

    def event(self, index: int, text: str | None, finish: str | None, scores: Any = None) -> bytes:
        if self.chat:
            content: dict[str, Any] = {"delta": {} if text is None else {"content": text}}
        else:
            content = {"text": text or ""}
        choice = {"index": index, **content, "logprobs": scores, "finish_reason": finish}
        return _event(self.head() | {"choices": [choice]})

    def texts(self) -> Iterator[bytes]:
        """The text events: a chunk of each choice in turn."""
        each = [self.chunks_of(index) for index in range(self.n)]
        for k in range(len(each[0])):
            for index in range(self.n):
                chunk = each[index][k]
                yield self.event(index, "".join(chunk), None, self.scores(chunk, first=k == 0, end=False))

    def trailer(self) -> bytes:
        events = b""
        if self.script.finish is not None:
            scores = self.scores((), first=False, end=True) if self.script.end_token is not None else None
            events = b"".join(self.event(index, None, self.script.finish, scores) for index in range(self.n))
        usage = self.usage()
        if usage is not None and self.include_usage:
            events += _event(self.head() | {"choices": [], "usage": usage})
        return events + (b"data: [DONE]\n\n" if self.script.done else b"")

    async def streamed(self) -> bool:
        """False when the script broke the answer off."""
        script = self.script
        headers = {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"} | script.headers
        self.connection.send_head(200, headers)
        if self.chat:
            roles = (
                {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                for index in range(self.n)
            )
            self.write(b"".join(_event(self.head() | {"choices": [choice]}) for choice in roles))
        if script.block:
            self.write(b"".join(self.texts()) + self.trailer())
            self.connection.transport.write(_LAST_CHUNK)
            return True
        k = 0
        for event in self.texts():
            if await self.broken(k, event):
                return False
            if k:
                await self.held(k)
                await asyncio.sleep(script.pause_s)
            self.write(event)
            k += 1
        if await self.broken(k, b"data: {}\n\n"):
            return False
        if k:
            await self.held(k)
        self.write(self.trailer())
        self.connection.transport.write(_LAST_CHUNK)
        return True

    async def broken(self, k: int, event: bytes) -> bool:
        script = self.script
        if script.error_at == k:
            self.write(_event({"error": script.error}))
            self.connection.transport.write(_LAST_CHUNK)
            self.received.answered.set()
            self.connection.next_request()
            return True
        if k in (script.reset_at, script.close_at):
            self.write(event[: len(event) // 2])
            await self.break_off()
            return True
        return False

    def write(self, events: bytes) -> None:
        """One HTTP chunk."""
        if events:
            self.connection.transport.write(b"%x\r\n%b\r\n" % (len(events), events))


_LAST_CHUNK = b"0\r\n\r\n"


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"
