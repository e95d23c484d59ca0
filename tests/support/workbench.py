"""The service put together around fake providers and an injected clock, without HTTP."""

import asyncio
import itertools
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from random import Random
from typing import Any

from tests.support.clock import ManualClock
from tests.support.jobs import model
from tests.support.memory_ledger import MemoryLedger

from headgate.config import LimitSettings, Margins, RoutingSettings
from headgate.core.accounts import App, Developer, Principal
from headgate.core.completion import Answer, Chunk, CompletionRequest, Message, Prompt, StreamEnd
from headgate.core.models import Catalog, ModelSpec
from headgate.core.money import MarginPPM
from headgate.core.ports import Ledger, Provider
from headgate.providers.fake import Fake
from headgate.service.billing import Billing
from headgate.service.circuits import Circuits
from headgate.service.complete import Completions
from headgate.service.ids import Ids
from headgate.service.images import Images
from headgate.service.limits import Limiter
from headgate.service.margins import MarginRules
from headgate.service.metrics import Metrics
from headgate.service.planning import Planner
from headgate.service.routing import Router
from headgate.service.serving import Serving
from headgate.service.streams import Running, RunningStream, Streams

ANN = Principal(account="ann", key_id="key-1")
RICH = 10**10
NO_MARGIN = Margins(
    default=MarginPPM(0), floor=None, cap=MarginPPM(990_000), platform_share_percent=Decimal(0)
)
_numbers = itertools.count(1)


def spec(name: str = "fast", provider: str = "fake", **fields: Any) -> ModelSpec:
    """A model of the fake: 500 nano-USD per input token, 250 cached, 1500 per output token."""
    return model(name=name, provider=provider, **fields)


def request(*prompts: Prompt, **fields: Any) -> CompletionRequest:
    """A request for "fast"; without prompts "say hello"."""
    number = next(_numbers)
    given: dict[str, Any] = {
        "request_id": f"req-{number}",
        "answer_id": f"00000000-0000-4000-8000-{number:012}",
        "stream_id": f"{number:032x}",
        "created": 1,
        "dialect": "openai",
        "models": ("fast",),
        "prompts": prompts or ("say hello",),
        "max_tokens": 64,
    }
    if "messages" in fields:
        given["prompts"] = None
    return CompletionRequest(**given | fields)


def said(*contents: str) -> tuple[Message, ...]:
    return tuple(Message(role="user", content=content) for content in contents)


def running_for(asked: CompletionRequest, principal: Principal = ANN) -> Any:
    kind: Callable[..., Running] = RunningStream if asked.stream else Running
    return kind(
        dialect=asked.dialect,
        stream_id=asked.stream_id,
        account=principal.account,
        app=asked.app,
        user=asked.user,
    )


async def read_all(running: RunningStream) -> tuple[list[Chunk], StreamEnd]:
    """Every chunk of a stream and its end; raises its error."""
    chunks: list[Chunk] = []
    while True:
        item = await running.next(60)
        if isinstance(item, StreamEnd):
            return chunks, item
        chunks += item or ()


class Workbench:
    """`models` default to one model "fast" of the one fake; `ann` has 10 USD."""

    def __init__(
        self,
        *models: ModelSpec,
        fakes: Iterable[Provider] | None = None,
        ledger: Ledger | None = None,
        margins: Margins = NO_MARGIN,
        apps: Mapping[str, App] | None = None,
        developers: Mapping[str, Developer] | None = None,
        limits: LimitSettings | None = None,
        clock: ManualClock | None = None,
        routing: RoutingSettings | None = None,
        images: Images | None = None,
    ) -> None:
        self.clock = clock or ManualClock()
        self.memory = MemoryLedger({"ann": RICH})
        self.ledger: Ledger = ledger or self.memory
        self.fake = Fake()
        self.providers: dict[str, Provider] = {fake.name: fake for fake in fakes or (self.fake,)}
        self.metrics = Metrics()
        rules = routing or RoutingSettings(retries=0, breaker_failures=0)
        self.circuits = Circuits(rules, self.clock)
        self.serving = Serving(Catalog(models or (spec(),)), self.providers, self.circuits)
        router = Router(self.circuits, rules, self.metrics, Random(7))
        self.planner = Planner(
            self.serving, router, MarginRules(margins, apps or {}), developers or {}, images
        )
        self.limiter = Limiter(limits or LimitSettings(), self.clock)
        self.billing = Billing(self.ledger, self.clock, margins.platform_share_percent, Ids())
        self.streams = Streams()
        self.completions = Completions(
            self.planner, router, self.limiter, self.billing, self.streams, self.clock, self.metrics
        )

    async def ask(
        self, asked: CompletionRequest, running: Running | None = None, principal: Principal = ANN
    ) -> Answer:
        """The answer of a blocking request."""
        return await self.completions.complete(asked, principal, running or running_for(asked, principal))

    def start(self, asked: CompletionRequest, principal: Principal = ANN) -> RunningStream:
        """A stream under way."""
        running: RunningStream = running_for(asked, principal)
        self.completions.stream(asked, principal, running)
        return running

    async def stream(
        self, asked: CompletionRequest, principal: Principal = ANN
    ) -> tuple[list[Chunk], StreamEnd]:
        """All of a stream."""
        return await read_all(self.start(asked, principal))

    async def settle_down(self) -> None:
        """Wait until nothing is left to be closed."""
        async with asyncio.timeout(30):
            await self.streams.idle(30)
            await self.billing.aclose()
