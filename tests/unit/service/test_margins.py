"""Whose margin counts, and how far a request may move it."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.workbench import request, spec

from headgate.config import Margins
from headgate.core.accounts import App, Variable
from headgate.core.completion import CompletionRequest
from headgate.core.errors import InvalidRequest
from headgate.core.models import ModelSpec
from headgate.core.money import MarginPPM
from headgate.service.margins import MarginRules

TEN, TWENTY, THIRTY = MarginPPM(100_000), MarginPPM(200_000), MarginPPM(300_000)


def app(name: str, margin: str | None) -> App:
    return App(
        name=name,
        model="fast",
        prompt="{{q}}",
        variables=(Variable(name="q"),),
        margin_percent=None if margin is None else Decimal(margin),
    )


APPS = {"dear": app("dear", "30"), "usual": app("usual", None)}


def margin(
    asked: CompletionRequest,
    model: ModelSpec,
    *,
    floor: int | None = None,
    cap: int = 990_000,
) -> int:
    margins = Margins(
        default=TEN,
        floor=None if floor is None else MarginPPM(floor),
        cap=MarginPPM(cap),
        platform_share_percent=Decimal(0),
    )
    return MarginRules(margins, APPS).margin_for(asked, model)


def test_the_nearest_default_counts() -> None:
    assert margin(request(), spec()) == TEN
    assert margin(request(), spec(margin=TWENTY)) == TWENTY
    assert margin(request(), spec(margin=MarginPPM(0))) == 0
    assert margin(request(app="dear"), spec(margin=TWENTY)) == THIRTY
    assert margin(request(app="usual"), spec(margin=TWENTY)) == TWENTY
    assert margin(request(app="usual"), spec()) == TEN


@pytest.mark.parametrize(
    ("model", "name", "lowest"),
    [(spec(), None, "10"), (spec(margin=TWENTY), None, "20"), (spec(), "dear", "30")],
)
def test_an_override_may_only_raise_the_margin_that_counts(
    model: ModelSpec, name: str | None, lowest: str
) -> None:
    at_least = Decimal(lowest)
    assert margin(request(app=name, margin_override=at_least), model) == int(at_least * 10_000)
    with pytest.raises(InvalidRequest, match=f"{lowest} to 99") as refusal:
        margin(request(app=name, margin_override=at_least - Decimal("0.0001")), model)
    assert (refusal.value.param, refusal.value.allowed) == ("overrideGrossMarginPercent", f"{lowest} to 99")


def test_a_lower_floor_lets_an_override_fall_to_it() -> None:
    assert margin(request(margin_override=Decimal(5)), spec(), floor=50_000) == 50_000
    assert margin(request(margin_override=Decimal(0)), spec(), floor=0) == 0
    with pytest.raises(InvalidRequest, match="5 to 99"):
        margin(request(margin_override=Decimal("4.9999")), spec(), floor=50_000)


def test_a_floor_does_not_move_the_default() -> None:
    assert margin(request(), spec(), floor=0) == TEN


def test_the_cap_holds() -> None:
    assert margin(request(margin_override=Decimal(40)), spec(), cap=400_000) == 400_000
    with pytest.raises(InvalidRequest, match="10 to 40"):
        margin(request(margin_override=Decimal("40.0001")), spec(), cap=400_000)


@given(st.integers(0, 990_000))
def test_every_override_in_range_counts_exactly(ppm: int) -> None:
    override = Decimal(ppm).scaleb(-4)
    if ppm >= TEN:
        assert margin(request(margin_override=override), spec()) == ppm
    else:
        with pytest.raises(InvalidRequest):
            margin(request(margin_override=override), spec())
