"""An upstream that breaks in every way: it writes exactly the bytes a test gives it, in steps, to a real socket.

    async with FaultUpstream() as up:
        play = up.play("cell-7", (STREAM, chunk(b"data: ..."), HEARD, RESET))
        ...                              # a request whose words hold "cell-7" comes, to whichever path
        play.heard.set()                 # lets HEARD go on

A request is answered by the play whose tag stands in its body.
"""

import asyncio
import re
from collections.abc import Sequence
from enum import Enum, auto
from itertools import pairwise

from msgspec import Struct
from tests.support.upstream import Connection, Received, Upstream

SHORT_PAUSE_S = 0.01
MAX_UNSENT = 1 << 20
TAG = re.compile(rb"cell-\d+")


class Act(Enum):
    HEARD = auto()
    """Wait until the test says that its client has what was sent so far."""
    PAUSE = auto()
    """A moment of silence."""
    TURN = auto()
    """Let the other side read what was sent so far before more follows."""
    STALL = auto()
    """Nothing more, and the connection stays open."""
    CLOSE = auto()
    RESET = auto()


class Endless(Struct, frozen=True):
    """The same again and again until the connection is gone, as fast as it is read or every so many seconds."""

    block: bytes
    every_s: float = 0.0


HEARD, PAUSE, TURN, STALL, CLOSE, RESET = Act
Step = bytes | Act | Endless
Steps = tuple[Step, ...]

LAST_CHUNK = b"0\r\n\r\n"


def head(status: int = 200, content_type: str = "application/json", **headers: str) -> bytes:
    """The head of a response; underscores in names of headers stand for hyphens."""
    named = {"Content-Type": content_type} | {name.replace("_", "-"): text for name, text in headers.items()}
    lines = "".join(f"{name}: {text}\r\n" for name, text in named.items())
    return f"HTTP/1.1 {status} Scripted\r\n{lines}\r\n".encode("latin-1")


def whole(body: bytes, status: int = 200, content_type: str = "application/json", **headers: str) -> bytes:
    """A response that is all there."""
    return head(status, content_type, Content_Length=str(len(body)), **headers) + body


def chunk(content: bytes) -> bytes:
    """One HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(content), content) if content else b""


STREAM = head(200, "text/event-stream", Transfer_Encoding="chunked")
CHUNKED_JSON = head(200, "application/json", Transfer_Encoding="chunked")


def cut(content: bytes, *places: int) -> list[bytes]:
    """The pieces between these places; none is empty."""
    edges = sorted({0, len(content), *places})
    return [content[start:end] for start, end in pairwise(edges)]


def in_turns(pieces: Sequence[bytes]) -> Steps:
    """Each piece is read by itself."""
    steps: list[Step] = []
    for piece in pieces:
        steps += (piece, TURN)
    return tuple(steps)


class Play:
    """What answers one tag, and what became of it.

    `asked` is set when a request is there, `stalled` at STALL, HEARD and Endless. `heard` lets HEARD go on.
    """

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.requests: list[Received] = []
        self.asked = asyncio.Event()
        self.stalled = asyncio.Event()
        self.heard = asyncio.Event()

    async def over(self) -> None:
        """Wait until each connection is gone, or its answer has come to its end."""
        for received in self.requests:
            ends = [asyncio.ensure_future(event.wait()) for event in (received.answered, received.closed)]
            try:
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for end in ends:
                    end.cancel()


class FaultUpstream(Upstream):
    def __init__(self) -> None:
        super().__init__()
        self._plays: dict[bytes, Play] = {}

    @property
    def origin(self) -> str:
        return self.url.removesuffix("/v1")

    def play(self, tag: str, steps: Steps) -> Play:
        play = self._plays[tag.encode()] = Play(steps)
        return play

    def forget(self, tag: str) -> None:
        del self._plays[tag.encode()]

    async def _serve(self, connection: Connection, received: Received) -> None:
        found = TAG.search(received.body)
        assert found is not None, received.body
        play = self._plays[found[0]]
        play.requests.append(received)
        play.asked.set()
        for step in play.steps:
            await _take(connection, step, play)
        if not connection.transport.is_closing():
            received.answered.set()
            connection.next_request()


async def _take(connection: Connection, step: Step, play: Play) -> None:
    transport = connection.transport
    match step:
        case bytes():
            transport.write(step)
        case Endless():
            play.stalled.set()
            while True:  # until the connection is lost, which cancels this
                if transport.get_write_buffer_size() < MAX_UNSENT:
                    transport.write(step.block)
                    await asyncio.sleep(step.every_s)
                else:
                    await asyncio.sleep(0.001)
        case Act.HEARD:
            play.stalled.set()
            await play.heard.wait()
        case Act.STALL:
            play.stalled.set()
            await asyncio.Event().wait()
        case Act.PAUSE:
            await asyncio.sleep(SHORT_PAUSE_S)
        case Act.TURN:
            # The other side is on this loop too: its socket is ready in the next turn, and read before ours goes on.
            for _ in range(2):
                await asyncio.sleep(0)
        case Act.CLOSE:
            transport.close()
        case Act.RESET:
            connection.reset()
