"""Server-sent events, cut out of byte blocks as they arrive.

Only `data` matters to the upstreams we speak to; comments, `event`, `id` and `retry` lines are skipped. A line
ends with \\n, \\r\\n or \\r, an event with an empty line, and a block may end anywhere.
"""

from headgate.core.errors import UpstreamFailed

MAX_EVENT_BYTES = 4 * 1024 * 1024
MAX_DATA_LINES = 16 * 1024
"""Of one event; most have one, and what is written for people to read a few hundred."""


class SSEReader:
    """Splits one stream. Feed it every block, in order."""

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._kept = bytearray()
        self._half_newline = False

    def feed(self, block: bytes) -> list[bytes]:
        """The data of the events that end in this block. UpstreamFailed when an event grows too large."""
        # The usual block is a burst of whole events.
        if self._kept or self._half_newline or not block.endswith(b"\n\n") or b"\r" in block:
            block = self._up_to_last_end(block)
        found = []
        for event in block.split(b"\n\n"):
            if len(event) > 6 and event.startswith(b"data: ") and b"\n" not in event:
                found.append(event[6:])
            elif event and (data := _data(event)):
                found.append(data)
        return found

    def last(self) -> list[bytes]:
        """The data of an event that lacks its empty line because the stream ended."""
        return self.feed(b"\n\n")

    def _up_to_last_end(self, block: bytes) -> bytes:
        """All whole events, lines ending with \\n; what follows them is kept for the next block."""
        if self._half_newline:
            block = b"\r" + block
        self._half_newline = block.endswith(b"\r")  # perhaps the first half of \r\n
        if self._half_newline:
            block = block[:-1]
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        kept = self._kept
        searched = max(len(kept) - 1, 0)
        kept += block
        end = kept.rfind(b"\n\n", searched)
        whole = b""
        if end >= 0:
            whole = bytes(kept[:end])
            del kept[: end + 2]
        if len(kept) > self._max_event_bytes:
            raise UpstreamFailed("The provider sent an event that is too large.")
        return whole


def _data(event: bytes) -> bytes:
    """The data lines of an event, joined; empty when there are none. UpstreamFailed for too many of them.

    Only lines that begin as they do are cut out: others may be many, and cost nothing.
    """
    before, found, line = event.partition(b"\ndata: ")
    if found and b"\n" not in line and b"data" not in before:
        return line  # most events have a name and one line
    lines = []
    pieces = (b"\n" + event).split(b"\ndata", MAX_DATA_LINES + 1)
    if len(pieces) > MAX_DATA_LINES + 1:
        raise UpstreamFailed("The provider sent an event of too many lines.")
    for piece in pieces[1:]:
        line, _, _ = piece.partition(b"\n")
        if line.startswith(b":"):
            lines.append(line[1:].removeprefix(b" "))
        elif not line:
            lines.append(line)
    return b"\n".join(lines)
