"""What is charged, to the nano-USD, and that nobody spends more than there is."""

import asyncio
from collections.abc import AsyncIterator
from decimal import ROUND_CEILING, Decimal
from typing import Any

import pytest
import pytest_asyncio
from tests.support.catalogue import CACHED, INPUT, OUTPUT, catalogue, model, provider
from tests.support.client import BOTH_WAYS, DIALECTS, Client, Dialect, error_of, texts_of
from tests.support.script import Script
from tests.support.site import Site, open_site

from headgate.core.accounts import PLATFORM_ACCOUNT, UsageRow

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.process]

NANO = 10**9
CREDIT_USD = Decimal("0.0001")
FLOOR, PLATFORM_PERCENT = 5, 30
ODD = {"input_price": "0.123456789", "cached_input_price": "0.012345678", "output_price": "1.000000001"}
STATUSES = (400, 401, 404, 422, 429, 500, 503, 529, 504)
NAMES = (
    "plain", "held", "no-usage", "zero-usage", "error-event", "error-200", "reset", "reset-at-once", "cut",
    "scripted", *(f"status-{status}" for status in STATUSES),
)  # fmt: skip


def toml(url: str) -> str:
    return (
        f"""
[billing]
min_gross_margin_percent = "{FLOOR}"
platform_share_percent = "{PLATFORM_PERCENT}"

[developers.studio]
account = "studio"
applications = ["com.example.dev.app"]

[developers.rival]
account = "rival"
applications = ["com.example.rival.app"]
"""
        + catalogue(url, NAMES)
        + provider("hasty", url, "timeout_s = 0.2")
        + provider("nowhere", "http://127.0.0.1:9/v1")
        + model("odd", upstream_name="scripted", **ODD)
        + model("dear", upstream_name="plain", gross_margin_percent="25")
        + model(
            "dear-app", upstream_name="plain", app='gross_margin_percent = "40"', gross_margin_percent="25"
        )
        + model("silent", provider="hasty")
        + model("unreachable", provider="nowhere")
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with open_site(toml, tmp_path_factory.mktemp("money")) as site:
        # A default that no row and no request names would hide the others, so it is another server's (below).
        yield site


@pytest_asyncio.fixture(loop_scope="module")
async def client(site: Site) -> Client:
    site.mark()
    return await site.client()


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def ceil(amount: Decimal) -> int:
    return int(amount.to_integral_value(ROUND_CEILING))


def priced(exact_nano: Decimal | int, margin: str = "0") -> tuple[int, int]:
    """(cost, price) in nano-USD of an exact cost at a margin in percent."""
    exact = Decimal(exact_nano)
    return ceil(exact), ceil(exact * 100 / (100 - Decimal(margin)))


async def ask(client: Client, dialect: Dialect, stream: bool, model: str | list[str], **fields: Any) -> None:
    """One question that must be answered to its end."""
    if stream:
        listener = await client.stream(dialect, model, **fields)
        assert await listener.finish() == "completed", listener.last
    else:
        status, answer = await client.blocking(dialect, model, **fields)
        assert status == 200, answer


async def refused(client: Client, dialect: Dialect, stream: bool, model: str) -> tuple[int, dict[str, Any]]:
    async with await client.send(client.ask(dialect, model, stream=stream)) as response:
        return response.status, await response.json()


def untouched(site: Site, client: Client) -> bool:
    """Nothing was held, charged or recorded, and the upstream was not asked."""
    balance = site.books.balance(client.account)
    return (balance.balance, balance.held) == (10 * NANO, 0) and not (
        site.books.rows(client.account) or site.asked
    )


# Many at once


@pytest.mark.parametrize(
    ("dialect", "stream"),
    [
        ("openai", False),
        ("openai", True),
        ("chat", True),
        ("genstack", True),
        ("dify", False),
        ("thiggle", False),
    ],
)
async def test_of_200_parallel_requests_exactly_as_many_are_admitted_as_there_is_money_for(
    site: Site, dialect: Dialect, stream: bool
) -> None:
    site.mark()
    probe = await site.client()
    asking = asyncio.ensure_future(ask(probe, dialect, stream, "held"))
    ceiling = await site.books.held(probe.account)
    site.up.release()
    await asking
    (row,) = await site.books.settled(probe.account)

    site.mark()
    client = await site.client(10 * ceiling)
    judged: list[int] = []
    refusals: list[str] = []
    all_refused = asyncio.Event()

    async def one() -> None:
        question = client.ask(dialect, "held", stream=stream)
        async with await client.send(question) as response:
            body = await response.read()
            judged.append(response.status)
            if response.status != 200:
                refusals.append(error_of(dialect, await response.json()))
                if len(refusals) == 190:
                    all_refused.set()
            else:
                assert b"delta" in body

    client.ask(dialect, "held")  # makes the key of Dify's app, before the clock matters
    requests = [asyncio.ensure_future(one()) for _ in range(200)]
    async with asyncio.timeout(60):
        await all_refused.wait()
        await site.request(9)
        assert site.asked == 10
        assert site.books.balance(client.account).held == 10 * ceiling
        site.up.release()
        await asyncio.gather(*requests)
    assert site.asked == 10

    no_funds = (400, "provider_quota_exceeded") if dialect == "dify" else (402, "")
    names = {"genstack": "InsufficientFunds", "dify": no_funds[1]}
    assert sorted(judged) == sorted([200] * 10 + [no_funds[0]] * 190)
    assert set(refusals) == {names.get(dialect, "insufficient_funds")}
    rows = await site.books.settled(client.account, 10)
    assert {charged.price for charged in rows} == {row.price}
    assert row.price == row.prompt_tokens * INPUT + row.completion_tokens * OUTPUT > 0
    balance = site.books.balance(client.account)
    assert (balance.balance, balance.held) == (10 * (ceiling - row.price), 0)
    assert site.books.check().open_holds == 0


async def test_the_ceiling_is_every_prompt_byte_and_every_token_that_was_asked_for(
    site: Site, client: Client
) -> None:
    asking = asyncio.ensure_future(
        client.blocking("openai", "held", text=["one two", "three"], n=3, max_tokens=10)
    )
    held = await site.books.held(client.account)
    site.up.release()
    await asking
    assert held == (len("one two") + len("three")) * INPUT + 2 * 3 * 10 * OUTPUT


async def test_money_that_covers_the_ceiling_but_for_a_nano_usd_is_not_enough(site: Site) -> None:
    ceiling = len("one two three") * INPUT + 64 * OUTPUT
    poor, just = await site.client(ceiling - 1), await site.client(ceiling)
    site.mark()
    status, answer = await poor.blocking("openai", "plain")
    assert (status, error_of("openai", answer), site.asked) == (402, "insufficient_funds", 0)
    status, _ = await just.blocking("openai", "plain")
    assert (status, site.asked) == (200, 1)


async def test_insufficient_funds_says_what_is_needed_and_what_there_is_in_credits(site: Site) -> None:
    poor = await site.client(150_000)
    status, answer = await poor.blocking("genstack", "plain", max_tokens=1000)
    assert (status, answer["error"]["type"]) == (402, "InsufficientFunds")
    details = answer["error"]["details"]
    assert Decimal(details["available"]) == Decimal("1.5")  # 150,000 nano-USD at 0.0001 USD a credit
    assert Decimal(details["required"]) > 1000 * OUTPUT / (CREDIT_USD * NANO)


# What is charged


@pytest.mark.parametrize(("dialect", "stream"), BOTH_WAYS)
@pytest.mark.parametrize(
    ("prompt", "completion", "cached"),
    [(7, 3, 5), (7, 3, 0), (1, 1, 1), (9, 64, 9), (0, 1, 0)],
)
async def test_the_providers_figures_are_charged_exactly(
    site: Site, client: Client, dialect: Dialect, stream: bool, prompt: int, completion: int, cached: int
) -> None:
    site.up.script(Script(usage=usage(prompt, completion, cached)))
    await ask(client, dialect, stream, "odd")
    (row,) = await site.books.settled(client.account)
    rates = {name: Decimal(price) * 1000 for name, price in ODD.items()}  # nano-USD per token
    cost, price = priced(
        (prompt - cached) * rates["input_price"]
        + cached * rates["cached_input_price"]
        + completion * rates["output_price"]
    )
    assert (row.cost, row.price, row.source, row.error) == (cost, price, "provider", None)
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (prompt, cached, completion)
    assert site.books.balance(client.account).balance == 10 * NANO - price


async def test_cached_input_costs_what_cached_input_costs(site: Site, client: Client) -> None:
    site.up.script(Script(usage=usage(10, 1, 8)))
    await ask(client, "openai", False, "scripted")
    (row,) = await site.books.settled(client.account)
    assert row.price == 2 * INPUT + 8 * CACHED + OUTPUT


@pytest.mark.parametrize(("dialect", "stream"), BOTH_WAYS)
async def test_a_reported_zero_bills_zero(site: Site, client: Client, dialect: Dialect, stream: bool) -> None:
    await ask(client, dialect, stream, "zero-usage")
    (row,) = await site.books.settled(client.account)
    assert (row.price, row.prompt_tokens, row.completion_tokens, row.source) == (0, 0, 0, "provider")
    assert row.error is None
    assert site.books.balance(client.account).balance == 10 * NANO


@pytest.mark.parametrize(("dialect", "stream"), BOTH_WAYS)
async def test_without_reported_usage_an_estimate_is_charged_and_called_one(
    site: Site, client: Client, dialect: Dialect, stream: bool
) -> None:
    await ask(client, dialect, stream, "no-usage")
    (row,) = await site.books.settled(client.account)
    assert (row.source, row.error) == ("estimate", None)
    assert row.prompt_tokens > 0
    assert 0 < row.completion_tokens <= len("alpha beta gamma delta")
    assert row.price == row.prompt_tokens * INPUT + row.completion_tokens * OUTPUT


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_blocking_and_streamed_are_charged_the_same(
    site: Site, client: Client, dialect: Dialect
) -> None:
    for name in ("plain", "no-usage"):
        await ask(client, dialect, False, name)
        await ask(client, dialect, True, name)
    plain, plain_streamed, guessed, guessed_streamed = await site.books.settled(client.account, 4)
    assert plain.price == plain_streamed.price > 0
    assert guessed.price == guessed_streamed.price > 0


async def test_usage_comes_with_its_source_and_price_on_the_command_line(site: Site, client: Client) -> None:
    await ask(client, "openai", False, "no-usage")
    await ask(client, "openai", False, "plain")
    await ask(client, "thiggle", True, "zero-usage")
    shown = (await site.server.cli("usage", "--account", client.account))["usage"]
    assert [row["source"] for row in shown] == ["provider", "provider", "estimate"]
    assert [row["dialect"] for row in shown] == ["thiggle", "openai", "openai"]
    zero, plain, _ = shown
    assert (zero["price_nano_usd"], zero["error"]) == (0, None)
    assert plain["price_nano_usd"] == 3 * INPUT + 4 * OUTPUT  # "one two three", "echo: one two three"
    balance = await site.server.cli("accounts", "show", client.account)
    spent = sum(row["price_nano_usd"] for row in shown)
    assert balance["balance_nano_usd"] == balance["available_nano_usd"] == 10 * NANO - spent
    assert (balance["held_nano_usd"], balance["open_holds"]) == (0, 0)
    assert (await site.server.cli("ledger", "check"))["ok"] is True


async def test_the_price_header_is_what_was_charged(site: Site, client: Client) -> None:
    for dialect in DIALECTS:
        before = site.books.balance(client.account).balance
        async with await client.send(client.ask(dialect, "plain")) as response:
            assert response.status == 200
            price = Decimal(response.headers["X-Headgate-Price"]) * NANO
            assert response.headers["X-Headgate-Provider"] == "acme"
        assert price == before - site.books.balance(client.account).balance > 0


# Prompts and choices


async def test_n_choices_of_one_call_count_their_prompt_once(site: Site, client: Client) -> None:
    status, answer = await client.blocking("openai", "plain", n=3)
    assert (status, site.asked, len(answer["choices"])) == (200, 1, 3)
    assert (await site.request()).json["n"] == 3
    (row,) = await site.books.settled(client.account)
    assert (row.prompt_tokens, row.completion_tokens) == (3, 3 * 4)
    assert row.price == 3 * INPUT + 12 * OUTPUT
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_are_counted_each(site: Site, client: Client, stream: bool) -> None:
    await ask(client, "openai", stream, "plain", text=["one", "two three", "four five six"], n=2)
    assert site.asked == 3
    (row,) = await site.books.settled(client.account)
    assert (row.prompt_tokens, row.completion_tokens) == (1 + 2 + 3, 2 * (2 + 3 + 4))
    assert row.price == 6 * INPUT + 18 * OUTPUT


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", ["openai", "chat"])
async def test_the_embedded_model_counts_a_prompt_once_for_all_its_choices(
    site: Site, client: Client, dialect: Dialect, stream: bool
) -> None:
    asked = {"text": "Once upon a time", "max_tokens": 8}
    await ask(client, dialect, stream, "demo", n=1, **asked)
    await ask(client, dialect, stream, "demo", n=4, **asked)
    one, four = await site.books.settled(client.account, 2)
    assert one.prompt_tokens == four.prompt_tokens > 0
    assert 4 <= four.completion_tokens <= 4 * 8
    for row in (one, four):
        # 0.10 and 0.40 USD per million tokens
        assert row.price == row.prompt_tokens * 100 + row.completion_tokens * 400
        assert row.source in {"provider", "tokenizer"}


@pytest.mark.parametrize(("dialect", "stream"), BOTH_WAYS)
async def test_what_goes_beyond_the_hold_is_recorded_and_not_charged(
    site: Site, client: Client, dialect: Dialect, stream: bool
) -> None:
    before = await excess_metric(client)
    site.up.script(Script(usage=usage(3, 50_000), hold_at=0))
    asking = asyncio.ensure_future(ask(client, dialect, stream, "scripted"))
    ceiling = await site.books.held(client.account)
    site.up.release()
    await asking
    (row,) = await site.books.settled(client.account)
    whole = 3 * INPUT + 50_000 * OUTPUT
    assert (row.price, row.excess, row.completion_tokens) == (ceiling, whole - ceiling, 50_000)
    assert site.books.balance(client.account).balance == 10 * NANO - ceiling
    assert await excess_metric(client) - before == row.excess


async def excess_metric(client: Client) -> float:
    async with client.session.get("/metrics") as response:
        lines = (await response.text()).splitlines()
    return sum(
        float(line.split(" ")[-1]) for line in lines if line.startswith("headgate_excess_nano_usd_total")
    )


# Margins and shares


async def bear(
    site: Site, client: Client, model: str, dialect: Dialect = "openai", **fields: Any
) -> UsageRow:
    before = len(site.books.rows(client.account))
    status, answer = await client.blocking(dialect, model, **fields)
    assert status == 200, answer
    return (await site.books.settled(client.account, before + 1))[-1]


async def test_the_margin_is_the_apps_else_the_models_else_the_installations(
    site: Site, client: Client
) -> None:
    exact = 3 * INPUT + 4 * OUTPUT
    for name, dialect, margin in (
        ("plain", "openai", "0"),
        ("dear", "openai", "25"),
        ("dear", "dify", "25"),
        ("dear-app", "openai", "25"),
        ("dear-app", "dify", "40"),
    ):
        row = await bear(site, client, name, dialect)  # type: ignore[arg-type]  # literals in a tuple
        assert (row.cost, row.price) == priced(exact, margin), (name, dialect)


@pytest.mark.parametrize("override", ["5", "33.3333", "50", "99", "5.0001"])
async def test_an_override_from_the_floor_on_sets_the_margin(
    site: Site, client: Client, override: str
) -> None:
    site.up.script(Script(pieces=("a", "b"), usage=usage(3, 1)))
    status, answer = await client.blocking(
        "genstack", "scripted", max_tokens=4000, overrideGrossMarginPercent=float(override)
    )
    (row,) = await site.books.settled(client.account)
    assert (row.cost, row.price) == priced(3 * INPUT + OUTPUT, override)
    assert status == 200
    assert Decimal(answer["usage"]["grossMarginPercent"]) == Decimal(override)
    assert Decimal(answer["usage"]["price"]) * NANO == row.price
    assert Decimal(answer["usage"]["inputCost"]) * NANO == 3 * INPUT
    assert Decimal(answer["usage"]["outputCost"]) * NANO == OUTPUT


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("override", [0, 4.9999])
async def test_an_override_below_the_floor_is_refused(
    site: Site, client: Client, stream: bool, override: float
) -> None:
    question = client.ask("genstack", "plain", stream=stream, overrideGrossMarginPercent=override)
    async with await client.send(question) as response:
        answer = await response.json()
    assert (response.status, answer["error"]["type"]) == (400, "InvalidRequest")
    assert answer["error"]["details"]["field"] == "overrideGrossMarginPercent"
    assert untouched(site, client)


async def test_balances_before_and_after_differ_by_the_price_in_credits(site: Site, client: Client) -> None:
    status, blocking = await client.blocking("genstack", "plain", overrideGrossMarginPercent=37.5)
    assert status == 200
    listener = await client.stream("genstack", "plain", overrideGrossMarginPercent=37.5)
    assert await listener.finish() == "completed"
    balance = 10 * NANO
    for answer, row in zip(
        (blocking, listener.last["response"]), await site.books.settled(client.account, 2), strict=True
    ):
        before, after = Decimal(answer["balanceBefore"]), Decimal(answer["balanceAfter"])
        assert before * CREDIT_USD * NANO == balance
        balance -= row.price
        assert after * CREDIT_USD * NANO == balance
        assert before - after == Decimal(answer["usage"]["price"]) / CREDIT_USD > 0
        assert (row.cost, row.price) == priced(
            row.prompt_tokens * INPUT + row.completion_tokens * OUTPUT, "37.5"
        )
    assert site.books.balance(client.account).balance == balance


@pytest.mark.parametrize("stream", [False, True])
async def test_the_margin_goes_to_the_developer_less_the_platforms_share(
    site: Site, client: Client, stream: bool
) -> None:
    platform = site.books.earned(PLATFORM_ACCOUNT)
    developer = site.books.balance("studio").balance
    await ask(
        client, "genstack", stream, "plain",
        developerId="studio", applicationId="com.example.dev.app", overrideGrossMarginPercent=17.3,
    )  # fmt: skip
    (row,) = await site.books.settled(client.account)
    margin = row.price - row.cost
    share = margin * (100 - PLATFORM_PERCENT) // 100
    shown = await site.server.cli("accounts", "show", "studio")
    assert shown["balance_nano_usd"] - developer == share > 0
    assert site.books.earned(PLATFORM_ACCOUNT) - platform == margin - share > 0
    assert row.developer == "studio"
    site.books.check()


async def test_without_a_developer_the_platform_takes_the_margin(site: Site, client: Client) -> None:
    platform = site.books.earned(PLATFORM_ACCOUNT)
    row = await bear(site, client, "dear")
    assert site.books.earned(PLATFORM_ACCOUNT) - platform == row.price - row.cost > 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"developerId": "nobody"}, "developerId"),
        ({"developerId": "studio", "applicationId": "com.example.nothing"}, "applicationId"),
        ({"developerId": "studio", "applicationId": "com.example.rival.app"}, "applicationId"),
        ({"applicationId": "com.example.dev.app"}, "applicationId"),
    ],
)
async def test_unknown_developers_and_applications_are_refused(
    site: Site, client: Client, stream: bool, fields: dict[str, Any], field: str
) -> None:
    async with await client.send(client.ask("genstack", "plain", stream=stream, **fields)) as response:
        answer = await response.json()
    assert (response.status, answer["error"]["type"]) == (400, "InvalidRequest")
    assert answer["error"]["details"]["field"] == field
    assert untouched(site, client)


async def test_an_installations_margin_is_the_floor_where_it_sets_no_other(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    def configuration(url: str) -> str:
        return (
            '[billing]\ngross_margin_percent = "12.5"\nmax_gross_margin_percent = "60"\n'
            + catalogue(url, ["plain"])
            + model("dear", upstream_name="plain", gross_margin_percent="25")
        )

    async with open_site(configuration, tmp_path_factory.mktemp("margins")) as site:
        client = await site.client()
        exact = 3 * INPUT + 4 * OUTPUT
        assert (await bear(site, client, "plain")).price == priced(exact, "12.5")[1]
        assert (await bear(site, client, "dear")).price == priced(exact, "25")[1]
        for name, override, status in (
            ("plain", 12.4999, 400),
            ("plain", 12.5, 200),
            ("plain", 60, 200),
            ("plain", 60.0001, 400),
            ("dear", 24.9999, 400),
            ("dear", 25, 200),
        ):
            found, answer = await client.blocking("genstack", name, overrideGrossMarginPercent=override)
            assert found == status, (name, override, answer)
        site.books.check()


# Failures

FAILURES = {
    # model: (openai, chat and thiggle, genstack, dify, the usage row's error)
    "status-500": (500, 502, 400, "upstream_failed"),
    "status-404": (500, 502, 400, "upstream_failed"),
    "status-401": (500, 502, 400, "upstream_auth"),
    "status-503": (503, 503, 503, "upstream_unavailable"),
    "status-529": (503, 503, 503, "upstream_unavailable"),
    "status-504": (504, 504, 504, "upstream_timeout"),
    "status-429": (429, 429, 429, "upstream_rate_limited"),
    "status-400": (400, 400, 400, "upstream_rejected"),
    "status-422": (422, 400, 400, "upstream_rejected"),
    "error-200": (503, 503, 503, "upstream_unavailable"),
    "reset-at-once": (500, 502, 400, "upstream_failed"),
    "silent": (504, 504, 504, "upstream_timeout"),
    "unreachable": (500, 502, 400, "upstream_failed"),
}


@pytest.mark.parametrize(("dialect", "stream"), BOTH_WAYS)
@pytest.mark.parametrize("name", FAILURES)
async def test_an_upstream_that_fails_before_any_output_costs_nothing(
    site: Site, client: Client, dialect: Dialect, stream: bool, name: str
) -> None:
    plain, genstack, dify, kind = FAILURES[name]
    expected = {"genstack": genstack, "dify": dify}.get(dialect, plain)
    if dialect == "thiggle" and plain == 500:
        expected = 502
    status, answer = await refused(client, dialect, stream, name)
    assert status == expected, answer
    (row,) = await site.books.settled(client.account)
    assert (row.price, row.cost, row.excess, row.error) == (0, 0, 0, kind)
    assert (row.prompt_tokens, row.completion_tokens, row.stream) == (0, 0, stream)
    assert site.books.balance(client.account).balance == 10 * NANO


@pytest.mark.parametrize("dialect", DIALECTS)
async def test_a_blocking_answer_that_breaks_off_costs_nothing(
    site: Site, client: Client, dialect: Dialect
) -> None:
    for number, name in enumerate(("reset", "cut"), start=1):
        status, answer = await client.blocking(dialect, name)
        assert (
            status == {"genstack": 502, "dify": 400, "openai": 500, "chat": 500, "thiggle": 502}[dialect]
        ), answer
        row = (await site.books.settled(client.account, number))[-1]
        assert (row.price, row.error) == (0, "upstream_failed")
    assert site.books.balance(client.account).balance == 10 * NANO


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["error-event", "reset", "cut"])
async def test_a_stream_that_breaks_is_charged_for_what_was_delivered(
    site: Site, client: Client, dialect: Dialect, name: str
) -> None:
    listener = await client.stream(dialect, name)
    assert await listener.finish() == "error"
    assert listener.text == "alpha beta"
    if dialect == "genstack":
        assert listener.last["error"]["type"] == "GatewayError"
    (row,) = await site.books.settled(client.account)
    ceiling = len("one two three") * INPUT + 64 * OUTPUT
    assert (row.error, row.source) == ("upstream_failed", "estimate")
    assert row.prompt_tokens > 0
    assert 0 < row.completion_tokens <= len("alpha beta")
    assert 0 < row.price == row.prompt_tokens * INPUT + row.completion_tokens * OUTPUT < ceiling
    assert site.books.balance(client.account).balance == 10 * NANO - row.price


@pytest.mark.parametrize("stream", [False, True])
async def test_of_several_models_only_those_that_answered_are_charged(
    site: Site, client: Client, stream: bool
) -> None:
    models = ["plain", "status-500", "silent", "plain", "unreachable"]
    if stream:
        listener = await client.stream("thiggle", models)
        assert await listener.finish() == "completed"
        choices = [choice for event in listener.events for choice in event["choices"]]
    else:
        status, answer = await client.blocking("thiggle", models)
        assert status == 200
        assert texts_of(answer) == ["echo: one two three", "", "", "echo: one two three", ""]
        choices = answer["choices"]
    failed = {choice["model"]: choice["finish_reason"] for choice in choices if choice.get("error")}
    assert failed == {"status-500": "error", "silent": "timeout", "unreachable": "error"}
    rows = await site.books.settled(client.account, 5)
    each = 3 * INPUT + 4 * OUTPUT
    assert [(row.model, row.price) for row in rows] == [
        ("plain", each), ("status-500", 0), ("silent", 0), ("plain", each), ("unreachable", 0),
    ]  # fmt: skip
    assert [row.error for row in rows] == [
        None,
        "upstream_failed",
        "upstream_timeout",
        None,
        "upstream_failed",
    ]
    assert site.books.balance(client.account).balance == 10 * NANO - 2 * each


@pytest.mark.parametrize(
    ("models", "status"),
    [
        (["status-500", "status-500"], 502),
        (["status-500", "status-504"], 502),
        (["status-504", "silent"], 504),
        (["status-503", "status-529"], 503),
    ],
)
async def test_when_every_model_failed_nothing_is_charged(
    site: Site, client: Client, models: list[str], status: int
) -> None:
    found, answer = await client.blocking("thiggle", models)
    assert found == status, answer
    rows = await site.books.settled(client.account, 2)
    assert all(row.price == 0 and row.error is not None for row in rows)
    assert site.books.balance(client.account).balance == 10 * NANO


async def test_the_books_are_right_after_all_of_this(site: Site) -> None:
    report = site.books.check()
    assert (report.open_holds, report.held) == (0, 0)
    assert report.transfers > 0
