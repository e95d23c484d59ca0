"""What upstreams do wrong, and what must come of it, by the contract: each fault as it breaks a blocking answer, a
stream, or both.

An answer that is an error is never charged; a stream that breaks is charged for what was delivered, by the
provider's figures where they came and else by an estimate.
"""

from collections.abc import Callable
from typing import Literal

from msgspec import Struct
from tests.support.causes import BY_STATUS, FAILED, TIMED_OUT, UNAVAILABLE, Cause
from tests.support.fault_upstream import (
    CHUNKED_JSON,
    CLOSE,
    HEARD,
    LAST_CHUNK,
    PAUSE,
    RESET,
    STALL,
    STREAM,
    TURN,
    Endless,
    Step,
    Steps,
    chunk,
    cut,
    head,
    in_turns,
    whole,
)
from tests.support.wires import FormatName, Wire

WORDS = ("alpha", " beta", " gamma", " delta")
TEXT = "".join(WORDS)
BEFORE = WORDS[:2]
"""What a stream says before it breaks."""

COUNTED = len(WORDS)
TRICKLE_S = 0.1
ALL: tuple[FormatName, ...] = ("completions", "chat", "anthropic", "cohere")
WITH_STATUS: tuple[FormatName, ...] = ("completions", "chat", "anthropic")

Charged = Literal["nothing", "provider", "estimate"]


class Outcome(Struct, frozen=True, kw_only=True):
    """`cause` None: a whole answer. `text` is all that the client gets; None: a beginning of it at most counts.

    `completion` are the output tokens that the provider reported, where they are charged. `retry_after` is what
    the client must be told, None where it does not matter.
    """

    cause: Cause | None = None
    text: str | None = TEXT
    charged: Charged = "provider"
    completion: int = COUNTED
    retry_after: int | None = None


class Scene(Struct, frozen=True):
    play: Callable[[Wire], Steps]
    outcome: Outcome


class Fault(Struct, frozen=True, kw_only=True):
    """`hasty`: it is one of time, so the provider that soon gives up is asked."""

    name: str
    blocking: Scene | None = None
    streamed: Scene | None = None
    hasty: bool = False
    formats: tuple[FormatName, ...] = ALL

    def scene(self, *, streams: bool) -> Scene | None:
        return self.streamed if streams else self.blocking


WHOLE = Outcome()
GUESSED = Outcome(charged="estimate")
BROKEN = Outcome(cause=FAILED, text="".join(BEFORE), charged="estimate")
NOTHING = Outcome(cause=FAILED, text="", charged="nothing")
LATE = Outcome(cause=TIMED_OUT, text="", charged="nothing")


def said(wire: Wire) -> bytes:
    """A whole blocking answer's body."""
    return wire.answer(TEXT, COUNTED)


def events(wire: Wire, completion: int | None = COUNTED) -> list[bytes]:
    """A whole stream, a piece of text at a time."""
    opening = wire.opening(usage=completion is not None)
    return [opening, *(wire.piece(word) for word in WORDS), wire.ending(completion)]


def streamed(blocks: list[bytes], start: bytes = STREAM) -> tuple[bytes, ...]:
    return (start, *(chunk(block) for block in blocks), LAST_CHUNK)


def begun(wire: Wire) -> list[Step]:
    """The beginning of a stream that will break."""
    return [STREAM, *(chunk(block) for block in (wire.opening(), *map(wire.piece, BEFORE)))]


def then(*steps: Step) -> Callable[[Wire], Steps]:
    """The beginning of a stream, and when the client has it, this."""
    return lambda wire: (*begun(wire), HEARD, *steps)


def only(*steps: Step) -> Callable[[Wire], Steps]:
    """The same in every format."""
    return lambda wire: steps


def after_text(wire: Wire, *blocks: bytes) -> Steps:
    """The beginning of a stream, and at once these events."""
    return (*begun(wire), *(chunk(block) for block in blocks))


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def half_said(wire: Wire) -> bytes:
    """A blocking answer that stops in its middle, in a response that promises all of it."""
    return whole(said(wire)).removesuffix(said(wire)) + half(said(wire))


def status(code: int, cause: Cause) -> Fault:
    def refuse(wire: Wire) -> Steps:
        return (whole(wire.error_body(code), code, Retry_After="7"),)

    outcome = Outcome(
        cause=cause, text="", charged="nothing", retry_after=7 if code in (429, 503, 529) else None
    )
    return Fault(name=f"status {code}", blocking=Scene(refuse, outcome), streamed=Scene(refuse, outcome))


def both(
    name: str,
    blocking: Callable[[Wire], Steps],
    streaming: Callable[[Wire], Steps],
    outcome: Outcome = NOTHING,
    *,
    hasty: bool = False,
    formats: tuple[FormatName, ...] = ALL,
) -> Fault:
    """A fault that comes to the same both ways."""
    return Fault(
        name=name,
        blocking=Scene(blocking, outcome),
        streamed=Scene(streaming, outcome),
        hasty=hasty,
        formats=formats,
    )


def fine(name: str, blocking: Callable[[Wire], Steps], streaming: Callable[[Wire], Steps]) -> Fault:
    """No fault at all, only unusual."""
    return both(name, blocking, streaming, WHOLE)


def same(
    name: str, play: Callable[[Wire], Steps], outcome: Outcome = NOTHING, *, hasty: bool = False
) -> Fault:
    """A fault that does not care what was asked for."""
    return both(name, play, play, outcome, hasty=hasty)


def stream_only(
    name: str,
    play: Callable[[Wire], Steps],
    outcome: Outcome = BROKEN,
    *,
    hasty: bool = False,
    formats: tuple[FormatName, ...] = ALL,
) -> Fault:
    return Fault(name=name, streamed=Scene(play, outcome), hasty=hasty, formats=formats)


GOOD = (
    fine("nothing wrong", lambda wire: (whole(said(wire)),), lambda wire: streamed([b"".join(events(wire))])),
    fine(
        "latency before the head",
        lambda wire: (PAUSE, whole(said(wire))),
        lambda wire: (PAUSE, *streamed(events(wire))),
    ),
    fine(
        "pauses within the answer",
        lambda wire: (half_said(wire), PAUSE, said(wire)[len(half(said(wire))) :]),
        lambda wire: tuple(step for part in streamed(events(wire)) for step in (part, PAUSE)),
    ),
    fine(
        "the head a byte at a time",
        lambda wire: in_turns(cut(whole(said(wire)), *range(len(whole(said(wire))) - len(said(wire))))),
        lambda wire: (*in_turns(cut(STREAM, *range(len(STREAM)))), *streamed(events(wire), b"")),
    ),
    fine(
        "early hints before the head",
        lambda wire: (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", TURN, whole(said(wire))),
        lambda wire: (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", TURN, *streamed(events(wire))),
    ),
    fine(
        "a body that the end of the connection ends",
        lambda wire: (head(Connection="close"), said(wire), CLOSE),
        lambda wire: (head(200, "text/event-stream", Connection="close"), *events(wire), CLOSE),
    ),
    fine(
        "a reset after the last byte",
        lambda wire: (whole(said(wire)), HEARD, RESET),
        lambda wire: (*streamed(events(wire)), HEARD, RESET),
    ),
    fine(
        "content types in other words",
        lambda wire: (whole(said(wire), 200, "Application/JSON; charset=UTF-8"),),
        lambda wire: streamed(
            events(wire), head(200, "Text/Event-Stream;charset=utf-8", Transfer_Encoding="chunked")
        ),
    ),
    both(
        "no usage",
        lambda wire: (whole(wire.answer(TEXT, None)),),
        lambda wire: streamed(events(wire, None)),
        GUESSED,
    ),
    both(
        "usage of no output",
        lambda wire: (whole(wire.answer(TEXT, 0)),),
        lambda wire: streamed(events(wire, 0)),
        Outcome(completion=0),
    ),
    stream_only(
        "usage with every piece",
        lambda wire: streamed(
            [
                wire.opening(),
                *(wire.counted(word, number) for number, word in enumerate(WORDS, start=1)),
                wire.half_ending(None),
            ]
        ),
        WHOLE,
        formats=WITH_STATUS,
    ),
    stream_only(
        "no last word", lambda wire: streamed([*events(wire)[:-1], wire.half_ending(COUNTED)]), WHOLE
    ),
    stream_only(
        "comments, names and lines without meaning",
        lambda wire: streamed(
            [part for event in events(wire) for part in (b": processing\n\n", b"retry: 3\nid: 7\n\n", event)]
        ),
        WHOLE,
    ),
    stream_only(
        "lines that end in other ways",
        lambda wire: streamed([event.replace(b"\n", b"\r\n") for event in events(wire)]),
        WHOLE,
    ),
)

BROKEN_OFF = (
    same("a reset instead of an answer", only(RESET)),
    same("an end instead of an answer", only(CLOSE)),
    same("half a head", only(b"HTTP/1.1 200 O", CLOSE)),
    same("a head that is none", only(b"\x16\x03\x01\x02\x00 hello\r\n\r\n", CLOSE)),
    same("a body that is promised and does not come", only(head(200, Content_Length="100"), CLOSE)),
    both(
        "a reset before the first event is whole",
        lambda wire: (half_said(wire), TURN, RESET),
        lambda wire: (STREAM, chunk(half(wire.opening() or wire.piece("x"))), TURN, RESET),
    ),
    both(
        "an end in the middle",
        lambda wire: (half_said(wire), CLOSE),
        lambda wire: (STREAM, chunk(wire.opening()), chunk(half(wire.piece("x"))), CLOSE),
    ),
    stream_only(
        "a reset in the middle of an event",
        lambda wire: (*begun(wire), chunk(half(wire.piece(" gamma"))), HEARD, RESET),
    ),
    stream_only(
        "an end in the middle of an event",
        lambda wire: (*begun(wire), chunk(half(wire.piece(" gamma"))), HEARD, CLOSE),
    ),
    stream_only("a reset between two events", then(RESET)),
    stream_only("a proper end that comes too early", then(LAST_CHUNK)),
    stream_only("chunks that cannot be read", then(b"zz\r\nhello\r\n")),
    stream_only(
        "a reset after the usage so far",
        lambda wire: (
            STREAM,
            *(chunk(part) for part in (wire.opening(), wire.piece("alpha"), wire.counted(" beta", 2))),
            HEARD,
            RESET,
        ),
        Outcome(cause=FAILED, text="".join(BEFORE), completion=2),
        formats=WITH_STATUS,
    ),
)

LYING = (
    same("a page instead of an answer", only(whole(b"<html>Welcome</html>", 200, "text/html"))),
    same("an empty body", only(whole(b""))),
    same("an empty stream", only(whole(b"", 200, "text/event-stream"))),
    same("JSON that is none", only(whole(b'{"choices": [{"te'))),
    same("JSON of another kind", only(whole(b'{"weather": "fine"}'))),
    same("a redirect", only(whole(b"", 302, Location="http://127.0.0.1:9/"))),
    same("a status without a body", only(b"HTTP/1.1 204 No Content\r\n\r\n")),
    same("packed content nobody asked for", only(whole(b"\x1f\x8b\x08\x00\x00", Content_Encoding="gzip"))),
    both(
        "the other kind of answer",
        lambda wire: streamed(events(wire)),
        lambda wire: (whole(said(wire)),),
    ),
    both(
        "an error with status 200",
        lambda wire: (whole(wire.error_body()),),
        lambda wire: (whole(wire.error_body()),),
    ),
    both(
        "an overload with status 200",
        lambda wire: (whole(wire.error_body(529)),),
        lambda wire: (whole(wire.error_body(529)),),
        Outcome(cause=UNAVAILABLE, text="", charged="nothing"),
        formats=WITH_STATUS,
    ),
    both(
        "bytes that are no characters",
        lambda wire: (whole(said(wire).replace(b"alpha", b"al\xffha")),),
        lambda wire: streamed([event.replace(b"alpha", b"al\xffha") for event in events(wire)]),
    ),
    both(
        "half a surrogate pair",
        lambda wire: (whole(said(wire).replace(b"alpha", rb"\ud800")),),
        lambda wire: streamed([event.replace(b"alpha", rb"\ud800") for event in events(wire)]),
    ),
    stream_only("an error as first event", lambda wire: streamed([wire.error_event()]), NOTHING),
    stream_only(
        "an overload as first event",
        lambda wire: streamed([wire.opening(), wire.error_event(529)]),
        Outcome(cause=UNAVAILABLE, text="", charged="nothing"),
        formats=WITH_STATUS,
    ),
    stream_only("an error event", lambda wire: after_text(wire, wire.error_event(), LAST_CHUNK)),
    stream_only(
        "an overload event",
        lambda wire: after_text(wire, wire.error_event(529)),
        Outcome(cause=UNAVAILABLE, text="".join(BEFORE), charged="estimate"),
        formats=WITH_STATUS,
    ),
    stream_only("an event that is no JSON", lambda wire: after_text(wire, b"data: {what}\n\n")),
    stream_only(
        "an event of no characters",
        lambda wire: after_text(wire, wire.piece("gamma").replace(b"gamma", b"\xf0\x9f")),
    ),
)

TOO_MUCH = (
    both(
        "an answer without an end",
        lambda wire: (CHUNKED_JSON, chunk(b'{"x":"'), Endless(chunk(b"x" * (1 << 18)))),
        lambda wire: (STREAM, Endless(chunk(b": nothing\n\n" * 5000))),
    ),
    stream_only(
        "a gigantic event",
        lambda wire: (STREAM, chunk(b'data: {"x":"'), Endless(chunk(b"x" * (1 << 18)))),
        NOTHING,
    ),
    stream_only(
        "a gigantic event after others", then(chunk(b'data: {"x":"'), Endless(chunk(b"x" * (1 << 18))))
    ),
    stream_only(
        "text without an end",
        lambda wire: (STREAM, chunk(wire.opening()), Endless(chunk(wire.piece("alpha beta" * 500)))),
        Outcome(cause=FAILED, text=None, charged="estimate"),
    ),
    stream_only(
        "events without text and without an end",
        lambda wire: (STREAM, chunk(wire.opening()), Endless(chunk(wire.piece("") * 500))),
        NOTHING,
    ),
)

TOO_SLOW = (
    same("silence", only(STALL), LATE, hasty=True),
    both("silence after the head", only(CHUNKED_JSON, STALL), only(STREAM, STALL), LATE, hasty=True),
    both(
        "silence in the middle",
        lambda wire: (half_said(wire), STALL),
        lambda wire: (STREAM, chunk(wire.opening()), chunk(half(wire.piece("x"))), STALL),
        LATE,
        hasty=True,
    ),
    both(
        "a trickle",
        only(CHUNKED_JSON, Endless(chunk(b" "), TRICKLE_S)),
        only(STREAM, Endless(chunk(b": nothing\n\n"), TRICKLE_S)),
        LATE,
        hasty=True,
    ),
    same(
        "a head that trickles",
        only(b"HTTP/1.1 200 OK\r\n", Endless(b"X-A: b\r\n", TRICKLE_S)),
        LATE,
        hasty=True,
    ),
    stream_only(
        "silence between two events",
        then(STALL),
        Outcome(cause=TIMED_OUT, text="".join(BEFORE), charged="estimate"),
        hasty=True,
    ),
    stream_only(
        "a trickle between two events",
        then(Endless(chunk(b": nothing\n\n"), TRICKLE_S)),
        Outcome(cause=TIMED_OUT, text="".join(BEFORE), charged="estimate"),
        hasty=True,
    ),
)

REFUSALS = (*(status(code, cause) for code, cause in BY_STATUS.items()), status(504, TIMED_OUT))

AT_ONCE = (*GOOD, *REFUSALS, *BROKEN_OFF, *LYING, *TOO_MUCH)
"""Those that need no waiting."""
