from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from headgate.core.accounts import UsageRow
from headgate.stores.posting import Posting, post

amounts = st.integers(min_value=0, max_value=10**12)
rows = st.builds(
    UsageRow,
    request_id=st.just("r"),
    dialect=st.just("openai"),
    model=st.just("demo"),
    provider=st.sampled_from(["acme", "embedded"]),
    cost=amounts,
    price=amounts,
    developer=st.sampled_from([None, "studio", "ann"]),
    developer_share=amounts,
)


def credited(posting: Posting) -> dict[str, int]:
    return {credit.account: credit.amount for credit in posting.credits}


@given(st.lists(rows, max_size=5), amounts)
def test_credits_sum_to_the_charge_and_the_charge_stays_in_the_limit(
    used: list[UsageRow], limit: int
) -> None:
    posting = post(used, limit)
    wanted = sum(row.price for row in used)
    assert posting.charge == min(wanted, limit)
    assert sum(row.price for row in posting.rows) == posting.charge
    assert sum(row.price + row.excess for row in posting.rows) == wanted
    assert sum(credit.amount for credit in posting.credits) == posting.charge
    assert all(credit.amount for credit in posting.credits)
    assert all(credit.amount > 0 for credit in posting.credits if credit.account != "platform")
    for row in posting.rows:
        assert row.developer_share == 0 or row.cost + row.developer_share <= row.price


def test_an_ordinary_price_is_divided_among_provider_developer_and_platform(
    row: Callable[..., UsageRow],
) -> None:
    used = row(cost=70, price=100, developer="studio", developer_share=20)
    posting = post([used], 500)
    assert credited(posting) == {"provider:acme": 70, "studio": 20, "platform": 10}
    assert posting.rows == (used,)


def test_a_capped_price_pays_the_cost_first_and_then_what_is_left_of_the_share(
    row: Callable[..., UsageRow],
) -> None:
    posting = post([row(cost=70, price=100, developer="studio", developer_share=20)], 75)
    assert credited(posting) == {"provider:acme": 70, "studio": 5}
    assert (posting.rows[0].price, posting.rows[0].excess, posting.rows[0].developer_share) == (75, 25, 5)


def test_the_platform_bears_what_a_capped_price_does_not_cover(row: Callable[..., UsageRow]) -> None:
    posting = post([row(cost=70, price=100)], 50)
    assert credited(posting) == {"provider:acme": 70, "platform": -20}


def test_several_rows_fill_the_limit_in_their_order(row: Callable[..., UsageRow]) -> None:
    posting = post([row(price=60), row(price=60), row(price=60)], 100)
    assert [(used.price, used.excess) for used in posting.rows] == [(60, 0), (40, 20), (0, 60)]


def test_nothing_charged_moves_nothing(row: Callable[..., UsageRow]) -> None:
    posting = post([row(cost=5, price=0, error="disconnected")], 100)
    assert (posting.charge, posting.credits) == (0, ())
