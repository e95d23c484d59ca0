"""The same good answer, cut at every byte of the response: text, usage and charge are those of the uncut one."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tests.support.client import texts_of
from tests.support.doors import STREAMING, Door
from tests.support.fault_site import FaultSite, open_fault_site, priced
from tests.support.fault_upstream import LAST_CHUNK, STREAM, FaultUpstream, Steps, chunk, cut, in_turns, whole
from tests.support.jobs import job
from tests.support.wires import CACHED, PROMPT, WIRES, Wire

from headgate.config import ProviderSettings
from headgate.core.accounts import UsageRow
from headgate.core.completion import Message, Usage
from headgate.core.ports import Provider
from headgate.providers.anthropic import Anthropic
from headgate.providers.cohere import Cohere
from headgate.providers.openai_compatible import OpenAICompatible

pytestmark = pytest.mark.asyncio(loop_scope="module")

PIECES = ("Grüße, ", "世界 ", "👩‍👩‍👧 ", "🌍\n\ndata: x")
TEXT = "".join(PIECES)
USAGE = Usage(prompt_tokens=PROMPT, completion_tokens=len(PIECES), cached_tokens=CACHED)
SAMPLE = 37
"""Through the whole gateway every so manieth place is tried; no event is as short as that."""

KINDS: dict[str, Any] = {"openai": OpenAICompatible, "anthropic": Anthropic, "cohere": Cohere}

every_wire = pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name)


def response(wire: Wire) -> bytes:
    """Everything that goes over the wire for a stream, HTTP's own lines included."""
    events = (wire.opening(), *map(wire.piece, PIECES), wire.ending(len(PIECES)))
    return STREAM + b"".join(chunk(event) for event in events) + LAST_CHUNK


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def up() -> AsyncIterator[FaultUpstream]:
    async with FaultUpstream() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[FaultSite]:
    async with open_fault_site(tmp_path_factory.mktemp("slices")) as opened:
        yield opened


def provider(wire: Wire, up: FaultUpstream) -> Provider:
    made: Provider = KINDS[wire.kind](
        "acme", ProviderSettings(kind=wire.kind, base_url=up.origin + wire.root), None  # type: ignore[arg-type]
    )  # fmt: skip
    return made


def asked(wire: Wire) -> Any:
    if wire.mode == "completion":
        return job(prompt="This is cell-1.")
    return job(messages=(Message(role="user", content="This is cell-1."),))


async def streamed(one: Provider, wire: Wire) -> tuple[str, list[str], Usage | None]:
    chunks = [piece async for batch in one.stream(asked(wire), lambda: None) for piece in batch]
    usages = [piece.usage for piece in chunks if piece.usage is not None]
    finishes = [piece.finish_reason for piece in chunks if piece.finish_reason is not None]
    return "".join(piece.text for piece in chunks), list(finishes), usages[-1] if usages else None


@every_wire
async def test_a_stream_cut_at_any_byte_is_the_same_to_a_provider(up: FaultUpstream, wire: Wire) -> None:
    sent, one = response(wire), provider(wire, up)
    cuts: list[Steps] = [in_turns(cut(sent, place)) for place in range(1, len(sent))]
    for place, steps in enumerate((*cuts, in_turns(cut(sent, *range(len(sent))))), start=1):
        up.play("cell-1", steps)
        assert await streamed(one, wire) == (TEXT, ["stop"], USAGE), place
    await one.aclose()


@every_wire
async def test_a_blocking_answer_cut_at_any_byte_is_the_same_to_a_provider(
    up: FaultUpstream, wire: Wire
) -> None:
    sent, one = whole(wire.answer(TEXT, len(PIECES))), provider(wire, up)
    cuts: list[Steps] = [in_turns(cut(sent, place)) for place in range(1, len(sent))]
    for place, steps in enumerate((*cuts, in_turns(cut(sent, *range(len(sent))))), start=1):
        up.play("cell-1", steps)
        completion = await one.complete(asked(wire), lambda: None)
        (choice,) = completion.choices
        assert (choice.text, choice.finish_reason, completion.usage) == (TEXT, "stop", USAGE), place
    await one.aclose()


@every_wire
async def test_a_stream_cut_anywhere_is_the_same_and_costs_the_same_at_every_door(
    site: FaultSite, wire: Wire
) -> None:
    sent = response(wire)
    uncut: Steps = (sent,)
    bytewise = in_turns(cut(sent, *range(len(sent))))
    cuts = [in_turns(cut(sent, place)) for place in range(len(STREAM), len(sent), SAMPLE)]
    for door in STREAMING:
        before = site.balance(door)
        rows = await asyncio.gather(*(one(site, wire, door, steps) for steps in (uncut, bytewise, *cuts)))
        prices = {row.price for row in rows}
        assert prices == {priced(rows[0])}
        assert site.balance(door) == before - rows[0].price * len(rows)
    site.check()


async def one(site: FaultSite, wire: Wire, door: Door, steps: Steps) -> UsageRow:
    visit = site.visit(door, wire.name, steps)
    reply = await visit.reply()
    assert reply.status == 200, reply.body
    assert door.complete(reply)
    assert "".join(text for event in reply.events if event != "[DONE]" for text in texts_of(event)) == TEXT
    (row,) = site.rows(visit)
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (PROMPT, CACHED, len(PIECES))
    assert (row.source, row.error) == ("provider", None)
    site.up.forget(visit.tag)
    return row
