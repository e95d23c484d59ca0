"""The engine process: llama.cpp's server for one model file, on a socket only its parent can reach.

Started by exec as `python -m headgate.providers.embedded.engine` (a server object does not survive a fork), with
options that come from the operator's configuration alone. It prints one JSON line on stdout when it is ready, and
ends on SIGTERM or when its stdin reaches its end: the parent holds the other end, so a parent that dies, however
it dies, takes its engine along, on Linux even one that is stopped. The socket and its folder go with it.

    engine MODEL.gguf --socket FOLDER/engine.sock    listens there
    engine MODEL.gguf                                listens on 127.0.0.1; the key is the first line of stdin
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from typing import Any, NoReturn

EXTRA_THREADS = 8
"""HTTP threads beyond two per slot: for tokenizing, templates, and sockets on their way out."""

PING_INTERVAL_S = 10
"""Streams that have begun and fall silent carry a comment this often."""

LOG_ERRORS_AND_WARNINGS = 2
PR_SET_PDEATHSIG = 1


def main() -> NoReturn:
    options = _options()
    _wake_when_parent_dies(options.socket)
    # The ready line must be alone on stdout, whatever the library prints.
    ready = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    key = "" if options.socket else sys.stdin.readline().strip()
    threading.Thread(target=_follow_parent, args=(options.socket,), daemon=True).start()
    try:
        server = _serve(options, key)
    except Exception as error:  # whatever the library raises, its text is the reason the operator sees
        print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(options.socket, 1)
    ready.write(json.dumps({"ready": server.listening_address, "pid": os.getpid()}) + "\n")
    ready.close()
    over.wait()
    _leave(options.socket, 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="engine")
    parser.add_argument("model")
    parser.add_argument("--socket", default="")
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="tokens per slot")
    return parser.parse_args()


def _serve(options: argparse.Namespace, key: str) -> Any:
    """A listening llama.cpp server. RuntimeError when the model cannot be loaded."""
    import xllamacpp  # late: loading the library takes longer than parsing options and watching the parent

    params = xllamacpp.CommonParams()
    params.model.path = options.model
    params.n_parallel = options.slots
    params.n_ctx = options.slots * options.context
    params.cpuparams.n_threads = options.threads
    params.cpuparams_batch.n_threads = options.threads
    params.n_threads_http = 2 * options.slots + EXTRA_THREADS
    params.hostnames = [options.socket or "127.0.0.1"]
    params.port = 0
    if key:
        params.api_keys = [key]
    params.ui = False
    params.endpoint_metrics = False
    params.endpoint_slots = True
    # The cache of finished prompts in RAM is 8 GB by default; each slot keeps its own last prompt anyway.
    params.cache_ram_mib = 0
    params.cache_idle_slots = False
    # A conversation that ends with the assistant gets a new turn, as elsewhere, not a continuation.
    params.prefill_assistant = False
    params.sse_ping_interval = PING_INTERVAL_S
    params.verbosity = LOG_ERRORS_AND_WARNINGS
    return xllamacpp.Server(params)


def _wake_when_parent_dies(socket: str) -> None:
    """Have Linux send SIGCONT when the parent dies, so that a stopped engine wakes and sees the end of its stdin.

    Not SIGKILL, which would leave the socket's folder behind.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    # The "parent" that counts is the thread that forked. asyncio, and uvloop too, forks in the thread that calls
    # create_subprocess_exec: the event loop's, which lives as long as the gateway.
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes  # late: not every Python is built with it

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0)
    # It may have died meanwhile. One that died before `getppid` has closed our stdin.
    if os.getppid() != parent:
        _leave(socket, 0)


def _follow_parent(socket: str) -> None:
    """Leave at once when stdin ends: nothing in this process is worth saving."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    _leave(socket, 0)


def _leave(socket: str, status: int) -> NoReturn:
    if socket:
        with contextlib.suppress(OSError):
            os.unlink(socket)  # noqa: PTH108  # pathlib is not worth its memory here
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(socket))  # noqa: PTH106, PTH120  # as above
    # Not sys.exit: destroying the server waits for its running requests.
    os._exit(status)


if __name__ == "__main__":
    main()
