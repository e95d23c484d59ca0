"""From JSON schemas to grammars, each in a process of its own (schema_check.py) that is killed when it takes too long.

Neither the gateway nor an engine may be held up by what a client sends; a few schemas are looked at at a time.
"""

import asyncio
import contextlib
import hashlib
import os
import sys
from weakref import WeakValueDictionary

import msgspec
from msgspec import Struct

from headgate.core.errors import InvalidRequest, UpstreamFailed
from headgate.providers.embedded.admission import Admission
from headgate.providers.embedded.child import environment
from headgate.providers.embedded.remembered import Remembered

MOST_SCHEMA_BYTES = 64 * 1024
CHECKS_AT_ONCE = 2
CHECKS_QUEUE = 16
DEADLINE_S = 2.0
REMEMBERED_VERDICTS = 128
REMEMBERED_BYTES = 4_000_000
TOO_COMPLICATED = "it is too complicated for the engine"
NOT_CHECKED = "The embedded engine cannot hold answers to JSON schemas on this machine."


class _Verdict(Struct, frozen=True):
    """What the process says: one of the two."""

    grammar: str = ""
    error: str = ""


class Schemas:
    """Grammars of schemas; the last ones are remembered."""

    def __init__(self) -> None:
        self._checking = Admission(CHECKS_AT_ONCE, CHECKS_QUEUE)
        self._verdicts: Remembered[bytes, _Verdict] = Remembered(REMEMBERED_VERDICTS, REMEMBERED_BYTES)
        # A lock lives as long as somebody checks or waits.
        self._locks: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    async def grammar(self, schema: bytes) -> str:
        """A grammar of what the JSON schema allows. InvalidRequest for a schema that the engine cannot follow."""
        text = _canonical(schema)
        key = hashlib.sha256(text).digest()
        verdict = self._verdicts.get(key) or await self._checked(key, text)
        if not verdict.grammar:
            raise _refusal(verdict.error or TOO_COMPLICATED)
        return verdict.grammar

    async def _checked(self, key: bytes, text: bytes) -> _Verdict:
        """One check for all who ask for this schema at the same time; only it takes a place in the queue."""
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        async with lock:
            verdict = self._verdicts.get(key)
            if verdict is None:
                await self._checking.enter()
                try:
                    verdict = await _check(text)
                finally:
                    self._checking.leave()
                self._verdicts.put(key, verdict, len(key) + len(verdict.grammar) + len(verdict.error))
        return verdict


def _canonical(schema: bytes) -> bytes:
    """The schema without blanks. The order of its properties stays: answers follow it."""
    try:
        text = msgspec.json.encode(msgspec.json.decode(schema))
    except RecursionError as error:
        raise _refusal("it is nested too deeply") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _refusal("it is not JSON") from error
    if len(text) > MOST_SCHEMA_BYTES:
        raise _refusal(
            f"it has {len(text)} bytes, and may have {MOST_SCHEMA_BYTES}",
            allowed=f"at most {MOST_SCHEMA_BYTES} bytes, blanks not counted",
        )
    return text


async def _check(schema: bytes) -> _Verdict:
    """Ask a process. It is gone when this ends, however it ends."""
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # as the engine
            "-m",
            "headgate.providers.embedded.schema_check",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=environment(os.environ),
            start_new_session=True,
        )
    except OSError as error:
        raise UpstreamFailed("The JSON schema could not be checked: no process could be started.") from error
    saying = asyncio.ensure_future(process.communicate(schema))
    try:
        # Not asyncio.timeout: see Child.end.
        await asyncio.wait({saying}, timeout=DEADLINE_S)
        late = not saying.done()
    finally:
        if not saying.done():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        said, _ = await saying
    if late:
        raise _refusal(TOO_COMPLICATED)  # not a verdict: the machine may have been busy
    if (process.returncode or 0) < 0:
        # It came to a limit that it set itself, or broke on the schema.
        return _Verdict(error=TOO_COMPLICATED)
    try:
        return msgspec.json.decode(said, type=_Verdict)
    except msgspec.MsgspecError as error:
        raise UpstreamFailed(NOT_CHECKED) from error


def _refusal(reason: str, *, allowed: str | None = None) -> InvalidRequest:
    return InvalidRequest(
        f"The JSON schema cannot be used: {reason.rstrip('.')}.", param="response_format", allowed=allowed
    )
