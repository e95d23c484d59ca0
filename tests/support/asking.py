"""Requests to the scripted upstream over the outbound HTTP port."""

from headgate.providers.http import Http

BODY = b'{"model": "plain", "prompt": "hi"}'
STREAM = b'{"model": "plain", "prompt": "one two three", "stream": true}'


def nothing() -> None:
    pass


async def ask(http: Http, body: bytes = BODY) -> bytes:
    response = await http.open("/completions", body, nothing)
    try:
        return await response.read(1_000_000)
    finally:
        response.close()
