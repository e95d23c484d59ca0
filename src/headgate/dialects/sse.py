"""Server-sent events, the way out. The format: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

DONE = b"data: [DONE]\n\n"
COMMENT_PING = b": ping\n\n"


def event(payload: bytes) -> bytes:
    """One `data:` event from one line of JSON."""
    return b"data: " + payload + b"\n\n"
