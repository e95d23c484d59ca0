"""What tests of dialects need of everybody else: who asks, a settled answer, and the events of a stream."""

import json
from decimal import Decimal
from typing import Any

from headgate.core.accounts import Principal
from headgate.core.completion import Answer, Charge, Choice, CompletionRequest, ModelAnswer, Usage
from headgate.core.models import ModelSpec
from headgate.core.money import FemtoUSD, MarginPPM, NanoUSD, rate
from headgate.dialects.base import RequestContext

ANSWER_ID = "7d444840-9dc0-11d1-b245-5ffdce74fad2"
SPEC = ModelSpec(
    name="acme-large",
    provider="acme",
    upstream_name="mock-model",
    mode="completion",
    context_window=8192,
    max_input_tokens=8000,
    max_output_tokens=4096,
    temperature=(0.0, 2.0),
    input_rate=rate(Decimal("0.50")),
    cached_rate=rate(Decimal("0.25")),
    output_rate=rate(Decimal("1.50")),
)


def context(app: str | None = None) -> RequestContext:
    return RequestContext(
        principal=Principal(account="acme", key_id="k1", app=app),
        request_id="req-1",
        answer_id=ANSWER_ID,
        stream_id="5" * 32,
        created=1_700_000_000,
    )


def answered(request: CompletionRequest, choices: tuple[Choice, ...] = (), *, cached: int = 0) -> Answer:
    """The answer of `SPEC`: 3 prompt tokens, 4 generated ones, free of charge."""
    charge = Charge(
        model=SPEC.name,
        provider=SPEC.provider,
        usage=Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=cached),
        exact_input=FemtoUSD(0),
        exact_output=FemtoUSD(0),
        cost=NanoUSD(0),
        price=NanoUSD(0),
        margin=MarginPPM(0),
    )
    served = ModelAnswer(
        requested=request.models[0],
        model=request.models[0],
        provider=SPEC.provider,
        spec=SPEC,
        choices=choices,
        charge=charge,
        elapsed_s=0.5,
        created=request.created,
    )
    return Answer(
        request=request,
        models=(served,),
        price=NanoUSD(0),
        balance_before=NanoUSD(0),
        balance_after=NanoUSD(0),
        elapsed_s=0.5,
    )


def events(stream: bytes) -> list[Any]:
    """The data of each event; a string where it is not JSON ([DONE])."""
    assert stream == b"" or stream.endswith(b"\n\n")
    parsed = []
    for block in stream.split(b"\n\n")[:-1]:
        assert block.startswith(b"data: ")
        assert b"\n" not in block
        payload = block.removeprefix(b"data: ")
        parsed.append(payload.decode() if payload == b"[DONE]" else json.loads(payload))
    return parsed
