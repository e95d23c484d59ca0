"""The requests of the memory benchmark: through every dialect's door, blocking and streamed, to upstreams of every
format, which answer whole or break in every way that the fault tests know.

The upstream runs in this process and plays what it is told for each request (tests/support/fault_upstream.py).
"""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import aiohttp
from msgspec import Struct
from tests.support.client import texts_of
from tests.support.doors import DOORS, Caller, Door, Reply
from tests.support.fault_upstream import HEARD, STALL, FaultUpstream, Play, Steps, whole
from tests.support.faults import (
    BEFORE,
    BROKEN_OFF,
    GOOD,
    LYING,
    REFUSALS,
    TOO_SLOW,
    Fault,
    begun,
    streamed,
)
from tests.support.wires import WIRES, Wire

from benchmarks.kit import BenchmarkError

MODEL_KINDS = ("plain", "faulty", "limited", "hasty")
"""What the models of each format are for: whole answers, faults, 429s, and an upstream that keeps silent. Faults have
models of their own, because a model that fails rests for a while."""

MOST_TOKENS = 256
PATIENCE_S = 30.0
CLOSE_S = 5.0
"""How soon the upstream must see that nobody wants its answer any more."""

MOST_PIECES = 60
MOST_PADDING = 2000
VOCABULARY = (
    "the",
    " harbour",
    " town",
    " tells",
    " long",
    " stories",
    " däys",
    " — and",
    " 雨",
    " w00",
    "\n",
)

ENOUGH = BEFORE[-1].encode()
"""The last that a client hears of a stream before it breaks."""

AT_ONCE = tuple(
    fault for fault in (*REFUSALS, *BROKEN_OFF, *LYING) if fault.name != "status 429"
)  # a 429 has models of its own


class Errand(Struct, frozen=True, kw_only=True):
    """One request to come: what is asked, what the upstream plays, and what to see to.

    `text` is what a whole answer must say, None where no whole answer must come. `leaves`: the client does, once it
    has heard a piece of the stream or, blocking, once the upstream was asked. `mistake` is put into a right request.
    """

    door: Door
    model: str
    steps: Steps = ()
    text: str | None = None
    leaves: bool = False
    mistake: "Mistake | None" = None


Mistake = Callable[[Door, dict[str, str], dict[str, Any]], tuple[dict[str, str], bytes]]
Maker = Callable[[random.Random, Door, Wire], Errand]


def plain(chance: random.Random, door: Door, wire: Wire) -> Errand:
    """A whole answer of any length."""
    words = chance.choices(VOCABULARY, k=chance.randint(1, MOST_PIECES))
    text = "".join(words)
    if door.streams:
        steps: Steps = streamed([wire.opening(), *map(wire.piece, words), wire.ending(len(words))])
    else:
        steps = (whole(wire.answer(text, len(words))),)
    return Errand(door=door, model=f"plain-{wire.name}", steps=steps, text=text)


def faulty(chance: random.Random, door: Door, wire: Wire) -> Errand:
    """A refusal, a broken connection, an error event, garbage; now and then a good answer, which closes a circuit."""
    faults = GOOD if chance.random() < 0.25 else AT_ONCE
    return _broken(chance, faults, door, wire, f"faulty-{wire.name}")


def limited(chance: random.Random, door: Door, wire: Wire) -> Errand:
    if chance.random() < 0.5:
        return _broken(chance, GOOD, door, wire, f"limited-{wire.name}")
    steps = (whole(wire.error_body(429), 429, Retry_After="1"),)
    return Errand(door=door, model=f"limited-{wire.name}", steps=steps)


def silent(chance: random.Random, door: Door, wire: Wire) -> Errand:
    """An upstream that says nothing more, until the gateway gives it up."""
    return _broken(chance, TOO_SLOW, door, wire, f"hasty-{wire.name}")


def deserted(_chance: random.Random, door: Door, wire: Wire) -> Errand:
    steps = (*begun(wire), STALL) if door.streams else (STALL,)
    return Errand(door=door, model=f"plain-{wire.name}", steps=steps, leaves=True)


def mistaken(chance: random.Random, door: Door, wire: Wire) -> Errand:
    return Errand(door=door, model=f"plain-{wire.name}", mistake=chance.choice(MISTAKES))


SHARES: dict[str, tuple[float, Maker]] = {
    "whole answers": (0.70, plain),
    "faults": (0.15, faulty),
    "429s": (0.03, limited),
    "silences": (0.01, silent),
    "clients that leave": (0.06, deserted),
    "clients' mistakes": (0.05, mistaken),
}
"""Of all requests, each chosen by chance."""


def _broken(chance: random.Random, faults: tuple[Fault, ...], door: Door, wire: Wire, model: str) -> Errand:
    scenes = [
        scene
        for fault in faults
        if wire.name in fault.formats and (scene := fault.scene(streams=door.streams)) is not None
    ]
    return Errand(door=door, model=model, steps=chance.choice(scenes).play(wire))


def _unreadable(_door: Door, headers: dict[str, str], body: dict[str, Any]) -> tuple[dict[str, str], bytes]:
    return headers, json.dumps(body).encode()[:-1]


def _nobody(door: Door, headers: dict[str, str], body: dict[str, Any]) -> tuple[dict[str, str], bytes]:
    headers, body = door.with_credential(headers, body, None)
    return headers, json.dumps(body).encode()


def _wrong_field(_door: Door, headers: dict[str, str], body: dict[str, Any]) -> tuple[dict[str, str], bytes]:
    wrong = {"messages": 7, "prompt": 7, "inputs": 7}
    return headers, json.dumps({name: wrong.get(name, value) for name, value in body.items()}).encode()


MISTAKES: tuple[Mistake, ...] = (_unreadable, _nobody, _wrong_field)


class Visitors:
    """Clients of one account at one gateway. `seen` counts what became of their requests, by share and result."""

    def __init__(
        self, url: str, up: FaultUpstream, caller: Caller, session: aiohttp.ClientSession, seed: int
    ) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()
        self.asked = 0
        self._url = url
        self._up = up
        self._caller = caller
        self._session = session
        self._chance = random.Random(seed)

    async def visit(self, requests: int, at_a_time: int) -> None:
        """Send so many requests and wait until each has come to its end, at the upstream too."""
        last = self.asked + requests

        async def one_by_one() -> None:
            while self.asked < last:
                self.asked += 1
                await self._one(self.asked)

        visitors = [asyncio.ensure_future(one_by_one()) for _ in range(at_a_time)]
        try:
            await asyncio.gather(*visitors)
        finally:
            for visitor in visitors:
                visitor.cancel()

    async def _one(self, number: int) -> None:
        chance = self._chance
        (share,) = chance.choices(list(SHARES), [part for part, _ in SHARES.values()])
        errand = SHARES[share][1](chance, chance.choice(DOORS), chance.choice(WIRES))
        tag = f"cell-{number}"
        play = self._up.play(tag, errand.steps)
        text = f"This is {tag}. {'So it goes. ' * chance.randint(0, MOST_PADDING // 12)}"
        where = f"{share}, {errand.door.name} to {errand.model}, {errand.steps!r:.300}"
        try:
            async with asyncio.timeout(PATIENCE_S):
                result = await self._result(errand, play, text)
            play.heard.set()
            async with asyncio.timeout(CLOSE_S):
                await play.over()
        except TimeoutError as error:
            raise BenchmarkError(f"a request did not come to its end: {where}") from error
        except aiohttp.ClientError as error:
            raise BenchmarkError(f"the gateway broke a connection: {error!r}, {where}") from error
        finally:
            self._up.forget(tag)
        self.seen[share, result] += 1

    async def _result(self, errand: Errand, play: Play, text: str) -> str:
        door = errand.door
        more = {} if door.dialect == "dify" else {_most_tokens_name(door): MOST_TOKENS}
        headers, fields = door.question(self._caller, text, model=errand.model, **more)
        body = json.dumps(fields).encode()
        if errand.mistake is not None:
            headers, body = errand.mistake(door, headers, fields)
        if errand.leaves and not door.streams:
            return await self._leave(door, headers, body, play)
        async with self._session.post(self._url + door.path, data=body, headers=headers) as response:
            content = bytearray()
            async for piece in response.content.iter_any():
                content += piece
                if HEARD in errand.steps and ENOUGH in content:
                    play.heard.set()
                if errand.leaves and ENOUGH in content:
                    response.close()
                    return "left"
            reply = Reply(status=response.status, headers=response.headers, body=bytes(content))
        return _judged(errand, reply)

    async def _leave(self, door: Door, headers: dict[str, str], body: bytes, play: Play) -> str:
        """Ask for a blocking answer and go before it comes."""

        async def wait() -> None:
            async with self._session.post(self._url + door.path, data=body, headers=headers):
                pass

        waiting = asyncio.ensure_future(wait())
        asked = asyncio.ensure_future(play.asked.wait())
        try:
            done, _ = await asyncio.wait([waiting, asked], return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            waiting.cancel()
        if waiting in done:
            raise BenchmarkError(f"{door.name}: the answer came before the upstream was asked")
        with suppress(asyncio.CancelledError):
            await waiting
        return "left"


def _most_tokens_name(door: Door) -> str:
    return "maxOutputTokens" if door.dialect == "genstack" else "max_tokens"


def _judged(errand: Errand, reply: Reply) -> str:
    """What came of it. BenchmarkError for anything but the answer where the upstream did nothing wrong."""
    door = errand.door
    if errand.mistake is not None:
        if reply.status not in (400, 401):
            raise BenchmarkError(f"{door.name}: a client's mistake is answered with {reply.status}")
        return str(reply.status)
    result = str(reply.status)
    if reply.status == 200:
        result = "whole" if not door.streams or door.complete(reply) else "broken off"
    if errand.text is not None:
        answers = [event for event in reply.events if event != "[DONE]"] if door.streams else [reply.json]
        said = "".join(text for answer in answers for text in texts_of(answer))
        if result != "whole" or said != errand.text:
            raise BenchmarkError(f"{door.name} to {errand.model}: {result}, {reply.body[-500:]!r}")
    return result
