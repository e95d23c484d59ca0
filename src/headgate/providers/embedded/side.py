"""The side door: a second, small HTTP server in the engine process, for what llama.cpp's server does not do.

It listens beside the engine's own socket, for the same parent with the same key, and speaks as little HTTP/1.1 as
that needs: one POST of JSON per connection, answered by JSON. Bytes travel as latin-1 strings. A refused request is
a 400 with `{"error": reason}`; a client that closes its socket stops the work it asked for.

    POST /vocabulary {}                         POST /score   {"ids", "from", "to", "top"}
    POST /pieces {"ids"}                        POST /recover {"ids", "text", "count", "top"}
"""

import contextlib
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, Protocol

from headgate.providers.embedded.failures import Failed, Gone, HasLeft, Refused, Unavailable

MOST_BODY_BYTES = 64 * 1024 * 1024
MOST_HEAD_BYTES = 16 * 1024
MOST_THREADS = 64
SOCKET_TIMEOUT_S = 30.0
LINGER_S = 1.0
WAITING_CONNECTIONS = 1024
FULL_PAUSE_S = 0.1

_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
}

Asked = Mapping[str, object]
Route = Callable[[Asked, HasLeft], object]
Routes = Mapping[str, Route]


class Scorer(Protocol):
    """What is asked here, as the scorer answers it; the scorer itself needs ctypes, which not every Python has."""

    def vocabulary(self) -> dict[str, object]: ...

    def pieces(self, ids: Sequence[int]) -> list[bytes]: ...

    def score(
        self, ids: Sequence[int], first: int, top: int, *, end: int | None, has_left: HasLeft
    ) -> dict[str, object]: ...

    def recover(
        self, ids: Sequence[int], text: bytes, count: int, top: int, *, has_left: HasLeft
    ) -> dict[str, object]: ...


class SideDoor:
    """Answers `routes` on the unix socket `path`, or on a loopback port to those who have `key`."""

    def __init__(self, routes: Routes, *, path: str = "", key: str = "") -> None:
        if not (path or key):
            raise ValueError("a loopback port needs a key")
        self._routes = routes
        self._key = key.encode()
        self._room = threading.BoundedSemaphore(MOST_THREADS)
        if path:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(path)
        else:
            self._listener = socket.socket(socket.AF_INET)
            self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(WAITING_CONNECTIONS)
        self.address: str | int = path or int(self._listener.getsockname()[1])

    def start(self) -> None:
        """Serve from now on, in threads that end with the process."""
        threading.Thread(target=self._serve, name="side door", daemon=True).start()

    def _serve(self) -> NoReturn:
        while True:
            self._room.acquire()
            try:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._attend, args=(connection,), daemon=True).start()
            except (OSError, RuntimeError):  # out of files or threads: some will be free again
                self._room.release()
                time.sleep(FULL_PAUSE_S)

    def _attend(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError, Gone):
                connection.settimeout(SOCKET_TIMEOUT_S)
                status, answer = self._respond(connection)
                body = json.dumps(answer, separators=(",", ":")).encode()
                head = (
                    f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                )
                connection.sendall(head.encode() + body)
                if status != 200:
                    _read_the_rest(connection)
        finally:
            self._room.release()

    def _respond(self, connection: socket.socket) -> tuple[int, object]:
        try:
            route, body = self._read(connection)
            return 200, route(_json(body), lambda: _has_left(connection))
        except _Status as status:
            return status.code, {"error": str(status)}
        except Refused as refusal:
            return 400, {"error": str(refusal)}
        except Unavailable as reason:
            return 501, {"error": str(reason)}
        except Failed as failure:
            _report(str(failure))
            return 500, {"error": str(failure)}
        except (Gone, OSError):
            raise
        except Exception as error:  # whatever it is, it is this request's alone
            _report(f"{type(error).__name__}: {error}")
            return 500, {"error": "an unexpected error"}
        finally:
            connection.settimeout(SOCKET_TIMEOUT_S)

    def _read(self, connection: socket.socket) -> tuple[Route, bytes]:
        """The route asked for and the body. A body that nobody may send is not read."""
        received = bytearray()
        while (end := received.find(b"\r\n\r\n")) < 0:
            if len(received) > MOST_HEAD_BYTES:
                raise _Status(400, "the head is too long")
            received += _receive(connection, 64 * 1024)
        request, *lines = bytes(received[:end]).split(b"\r\n")
        fields = {}
        for line in lines:
            name, _, value = line.partition(b":")
            fields[name.strip().lower()] = value.strip()
        method, path, *_ = [*request.split(b" "), b"", b""]
        if not self._may_enter(fields.get(b"authorization", b"")):
            raise _Status(401, "the key is missing or wrong")
        route = self._routes.get(path.decode("latin-1"))
        if route is None:
            raise _Status(404, "there is no such endpoint")
        if method != b"POST":
            raise _Status(405, "only POST is answered")
        length = fields.get(b"content-length", b"")
        if not length.isdigit():
            raise _Status(400, "the content length is missing")
        if len(length) > 12 or int(length) > MOST_BODY_BYTES:
            raise _Status(413, f"a body may have {MOST_BODY_BYTES} bytes")
        body = received[end + 4 :]
        while len(body) < int(length):
            body += _receive(connection, 1024 * 1024)
        return route, bytes(body[: int(length)])

    def _may_enter(self, said: bytes) -> bool:
        if not self._key:
            return True
        import hmac  # late: it loads a cryptography library, which is wanted only here

        return hmac.compare_digest(said, b"Bearer " + self._key)


class _Status(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


def routes(scorer: Scorer) -> Routes:
    """What the side door answers with this scorer."""

    def pieces(asked: Asked, _: HasLeft) -> object:
        return {"pieces": [piece.decode("latin-1") for piece in scorer.pieces(_ids(asked))]}

    def score(asked: Asked, has_left: HasLeft) -> object:
        ids = _ids(asked)
        first, end = _whole(asked, "from"), _whole(asked, "to", len(ids))
        return scorer.score(ids, first, _whole(asked, "top"), end=end, has_left=has_left)

    def recover(asked: Asked, has_left: HasLeft) -> object:
        text = asked.get("text")
        if not isinstance(text, str) or not all(ord(character) < 256 for character in text):
            raise Refused("text must be a string of latin-1 characters")
        raw = text.encode("latin-1")
        count, top = _whole(asked, "count"), _whole(asked, "top")
        return scorer.recover(_ids(asked), raw, count, top, has_left=has_left)

    return {
        "/vocabulary": lambda _asked, _: scorer.vocabulary(),
        "/pieces": pieces,
        "/score": score,
        "/recover": recover,
    }


def closed(reason: str) -> Routes:
    """The same paths where nothing behind them works."""

    def refuse(_asked: Asked, _: HasLeft) -> NoReturn:
        raise Unavailable(reason)

    return dict.fromkeys(("/vocabulary", "/pieces", "/score", "/recover"), refuse)


def _report(what: str) -> None:
    sys.stderr.write(f"side door: {what}\n")
    sys.stderr.flush()


def _receive(connection: socket.socket, most: int) -> bytes:
    piece = connection.recv(most)
    if not piece:
        raise Gone
    return piece


def _read_the_rest(connection: socket.socket) -> None:
    """What was not read of a refused request: closing on it would take the answer along."""
    connection.shutdown(socket.SHUT_WR)
    connection.settimeout(LINGER_S)
    left = MOST_BODY_BYTES
    while left > 0 and (piece := connection.recv(64 * 1024)):
        left -= len(piece)


def _has_left(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _json(body: bytes) -> Asked:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused("the body is not JSON") from error
    if not isinstance(asked, dict):
        raise Refused("the body must be an object")
    return asked


def _ids(asked: Asked) -> list[int]:
    ids = asked.get("ids")
    if not isinstance(ids, list) or not all(type(id) is int for id in ids):
        raise Refused("ids must be a list of integers")
    return ids


def _whole(asked: Asked, name: str, default: int = 0) -> int:
    value = asked.get(name, default)
    if type(value) is not int or not 0 <= value < 2**31:
        raise Refused(f"{name} must be an integer of at least 0")
    return value
