"""The engine process: llama.cpp's server for one model file, on a socket only its parent can reach.

Started by exec as `python -m headgate.providers.embedded.engine` (a server object does not survive a fork), with
options that come from the operator's configuration alone. It prints one JSON line on stdout when it is ready, and
ends on SIGTERM or when its stdin reaches its end: the parent holds the other end, so a parent that dies, however
it dies, takes its engine along, on Linux even one that is stopped. The sockets and their folder go with it.

    engine MODEL.gguf --folder FOLDER --socket FOLDER/engine.sock --side FOLDER/side.sock     listens there
    engine MODEL.gguf --folder FOLDER        listens on 127.0.0.1; the key is the first line of stdin
    -> {"ready": "unix socket or URL of the server", "side": "side socket" or port, "pid": 1234}

The side door (side.py) answers what llama.cpp's server does not. Where llama.cpp's C interface is not the known one
it answers 501 with the reason, and the server works all the same.

`--precision float32` computes in 32-bit floats throughout: a twin of the file with such weights lies in the folder
for as long as the engine runs (native code maps it, and the side door opens it when first asked), and is loaded
in its place. "auto" does so for small files, "stored" for none. A file that has no such twin is loaded as it is,
with a warning on stderr.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from typing import Any, NoReturn

from headgate.providers.embedded import side

EXTRA_THREADS = 8
"""HTTP threads beyond two per slot: for tokenizing, templates, and sockets on their way out."""

PING_INTERVAL_S = 10
"""Streams that have begun and fall silent carry a comment this often."""

SMALL_FILE = 16 * 1024 * 1024
"""Bytes up to which "auto" means float32: four times this much memory is no matter."""

HEADROOM = 4
"""Tokens of each slot beyond what requests may ask for: a character's last bytes may come after the last one asked
for. The server grants it up to the context the model was trained with."""

TWIN = "float32.gguf"

LOG_ERRORS_AND_WARNINGS = 2
PR_SET_PDEATHSIG = 1


def main() -> NoReturn:
    options = _options()
    _wake_when_parent_dies(options)
    # The ready line must be alone on stdout, whatever the library prints.
    ready = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    key = "" if options.socket else sys.stdin.readline().strip()
    if not (options.socket or key):
        _leave(options, 0)  # the parent died before it told the key
    threading.Thread(target=_follow_parent, args=(options,), daemon=True).start()
    try:
        library, reason = _library()
        file, exact = _in_precision(options, library)
        server = _serve(options, key, file, exact)
        door = side.SideDoor(_routes(options, library, reason, file, exact), path=options.side, key=key)
        door.start()
    except Exception as error:  # whatever the library raises, its text is the reason the operator sees
        print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(options, 1)
    line = {"ready": server.listening_address, "side": door.address, "pid": os.getpid()}
    ready.write(json.dumps(line) + "\n")
    ready.close()
    over.wait()
    _leave(options, 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="engine")
    parser.add_argument("model")
    parser.add_argument("--folder", default="", help="private, empty, and removed at the end")
    parser.add_argument("--socket", default="")
    parser.add_argument("--side", default="")
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True, help="tokens per slot")
    parser.add_argument("--precision", choices=("auto", "stored", "float32"), default="stored")
    options = parser.parse_args()
    if bool(options.socket) != bool(options.side):
        parser.error("--socket and --side belong together: an unprotected port for one of them would not do")
    return options


def _library() -> tuple[Any, str]:
    """llama.cpp's C interface, or None and why it cannot be used."""
    try:
        from headgate.providers.embedded import native  # late: not every Python is built with ctypes
    except ImportError:
        return None, "this Python is built without ctypes"
    try:
        return native.library(), ""
    except native.NativeUnavailable as error:
        return None, str(error)


def _in_precision(options: argparse.Namespace, library: Any) -> tuple[str, bool]:
    """The file to load, and whether to compute in 32-bit floats throughout."""
    if options.precision == "stored":
        return options.model, False
    try:
        if options.precision == "auto" and os.path.getsize(options.model) > SMALL_FILE:  # noqa: PTH202  # as below
            return options.model, False
        if not options.folder:
            raise OSError("there is no folder for its twin")
        if library is None:
            raise OSError("llama.cpp's functions are not available")
        from headgate.providers.embedded import float32  # late: it needs ctypes

        try:
            twin = os.path.join(options.folder, TWIN)  # noqa: PTH118  # as below
            float32.dequantise(library, options.model, twin, options.context + HEADROOM)
        except float32.Undequantised as error:
            raise OSError(str(error)) from error
    except OSError as error:
        _discard_twin(options)
        reason = error.strerror or error
        print(f"warning: loaded as stored, not as float32: {reason}", file=sys.stderr, flush=True)
        return options.model, False
    return twin, True


def _routes(options: argparse.Namespace, library: Any, reason: str, file: str, exact: bool) -> side.Routes:
    if library is None:
        return side.closed(reason)
    from headgate.providers.embedded.scorer import Scorer  # late: it needs ctypes

    scorer = Scorer(library, file, options.context, options.threads, exact)
    return side.routes(scorer)


def _serve(options: argparse.Namespace, key: str, file: str, exact: bool) -> Any:
    """A listening llama.cpp server. RuntimeError when the model cannot be loaded."""
    import xllamacpp  # late: loading the library takes longer than parsing options and watching the parent

    params = xllamacpp.CommonParams()
    params.model.path = file
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # Graphics processors multiply 32-bit floats as shorter ones.
        params.n_gpu_layers = 0
        params.no_op_offload = True
    params.n_parallel = options.slots
    params.n_ctx = options.slots * (options.context + HEADROOM)
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


def _wake_when_parent_dies(options: argparse.Namespace) -> None:
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
        _leave(options, 0)


def _follow_parent(options: argparse.Namespace) -> None:
    """Leave at once when stdin ends: nothing in this process is worth saving."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    _leave(options, 0)


def _leave(options: argparse.Namespace, status: int) -> NoReturn:
    for path in (options.socket, options.side):
        if path:
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108  # pathlib is not worth its memory here
    _discard_twin(options)
    if options.folder:
        with contextlib.suppress(OSError):
            os.rmdir(options.folder)  # noqa: PTH106  # as above
    # Not sys.exit: destroying the server waits for its running requests.
    os._exit(status)


def _discard_twin(options: argparse.Namespace) -> None:
    if options.folder:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(options.folder, TWIN))  # noqa: PTH108, PTH118  # as above


if __name__ == "__main__":
    main()
