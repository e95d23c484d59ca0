"""What is kept of a keyed request comes back as it was."""

import inspect

import pytest
from tests.support.workbench import Workbench, request

from headgate.core import errors
from headgate.core.accounts import Kept, Settlement
from headgate.core.completion import IdempotencyKey, Outcome
from headgate.core.errors import GatewayError, IdempotencyConflict, Overloaded
from headgate.core.money import NanoUSD
from headgate.providers.fake import Fake, FakeAnswer
from headgate.service import replays

SETTLED = Settlement(price=NanoUSD(7), balance_before=NanoUSD(10), balance_after=NanoUSD(3))
KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, GatewayError) and kind is not GatewayError
]


def made(kind: type[GatewayError]) -> GatewayError:
    if kind is errors.InsufficientFunds:
        return errors.InsufficientFunds(5, 2)
    return kind() if kind in (errors.InvalidCredentials, errors.InternalError) else kind("words")


@pytest.mark.parametrize("kind", KINDS)
async def test_an_error_keeps_its_kind_and_what_goes_with_it(kind: type[GatewayError]) -> None:
    answer = await Workbench().ask(request("one"))
    error = made(kind)
    kept = replays.encode(Outcome(kind="failed", answer=answer, error=error))
    again = replays.decode(Kept(outcome=kept, settlement=SETTLED)).error
    assert type(again) is kind
    assert str(again) == str(error)
    for name in ("message", "kind", "code", "param", "retry_after", "status", "allowed", "required_nano"):
        assert getattr(again, name, None) == getattr(error, name, None) or not hasattr(error, name)


async def test_an_answer_comes_back_with_its_settlement_and_without_its_words() -> None:
    answer = await Workbench().ask(request("secret words", user="somebody"))
    kept = replays.encode(Outcome(kind="completed", answer=answer))
    assert kept is not None
    assert b"somebody" not in kept
    again = replays.decode(Kept(outcome=kept, settlement=SETTLED)).answer
    assert (again.price, again.balance_before, again.balance_after) == (7, 10, 3)
    assert again.choices == answer.choices
    assert again.usage == answer.usage


@pytest.mark.parametrize("outcome", [None, b"", b"another version's"])
async def test_what_cannot_be_read_says_what_it_cost(outcome: bytes | None) -> None:
    with pytest.raises(IdempotencyConflict, match=r"charged 0\.000000007 USD"):
        replays.decode(Kept(outcome=outcome, settlement=SETTLED))


async def test_a_request_that_was_stopped_before_it_cost_anything_may_come_again() -> None:
    provider = Fake(default=FakeAnswer(error=Overloaded("full"), sent=False))
    bench = Workbench(fakes=[provider])
    key = IdempotencyKey(account="ann", key="k", digest=b"d")
    with pytest.raises(Overloaded):
        await bench.ask(request("one", idempotency=key))
    provider.default = FakeAnswer()
    first = await bench.ask(request("one", idempotency=key))
    again = await bench.ask(request("one", idempotency=key))
    assert first.choices == again.choices
    assert len(bench.memory.rows) == 2
