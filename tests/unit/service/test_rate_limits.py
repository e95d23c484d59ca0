"""Requests and tokens per minute: how much passes, what is told, what is given back."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.support.clock import ManualClock

from headgate.config import LimitSettings
from headgate.core.accounts import Principal
from headgate.core.errors import RateLimited
from headgate.service import limits as limits_module
from headgate.service.limits import Bucket, Limiter

ANN = Principal(account="ann", key_id="key-1")
BOB = Principal(account="bob", key_id="key-2")
TIMES = st.lists(st.tuples(st.floats(0, 90), st.integers(0, 300)), min_size=1, max_size=40)
CAPACITIES = st.integers(1, 10**6)


def limiter(requests: int = 0, tokens: int = 0) -> tuple[Limiter, ManualClock]:
    clock = ManualClock()
    return Limiter(LimitSettings(requests_per_minute=requests, tokens_per_minute=tokens), clock), clock


class TestBucket:
    @given(CAPACITIES, TIMES, st.floats(0, 10**9))
    def test_no_minute_passes_more_than_twice_its_measure(
        self, capacity: int, events: list[tuple[float, int]], start: float
    ) -> None:
        bucket, now = Bucket(capacity, start), start
        taken: list[tuple[float, int]] = []
        for pause, units in events:
            now += pause
            if bucket.take(units, now):
                taken.append((now, min(units, capacity)))
        for begin, _ in taken:
            within = sum(units for at, units in taken if begin <= at < begin + 60)
            assert within <= 2 * capacity * (1 + 1e-6) + 1

    @given(CAPACITIES, TIMES, st.floats(0, 10**9))
    @example(60, [(0.0, 60), (0.0, 27)], 511.4237604135763)  # adding 27 and taking it off again loses a bit
    def test_who_waits_as_long_as_told_gets_in(
        self, capacity: int, events: list[tuple[float, int]], start: float
    ) -> None:
        bucket, now = Bucket(capacity, start), start
        for pause, units in events:
            now += pause
            if not bucket.take(units, now):
                wait = bucket.wait(units, now)
                assert 1 <= wait <= 120
                now += wait
                assert bucket.take(units, now)

    @given(CAPACITIES, TIMES)
    def test_its_level_stays_between_nothing_and_the_capacity(
        self, capacity: int, events: list[tuple[float, int]]
    ) -> None:
        bucket, now = Bucket(capacity, 0.0), 0.0
        for pause, units in events:
            now += pause
            bucket.take(units, now)
            bucket.give_back(units // 2, now)
            assert 0 <= bucket.level(now) <= capacity
            assert 0 <= bucket.full_in(now) <= 60

    @given(CAPACITIES, st.floats(0, 10**6))
    def test_after_a_minute_it_is_full_again(self, capacity: int, start: float) -> None:
        bucket = Bucket(capacity, start)
        assert bucket.take(capacity, start)
        assert bucket.take(capacity, start + 61)

    def test_more_than_it_ever_holds_counts_as_all_of_it(self) -> None:
        bucket = Bucket(10, 0)
        assert bucket.take(10**9, 0)
        assert not bucket.take(1, 0)

    def test_it_refills_evenly(self) -> None:
        bucket = Bucket(60, 0)
        assert bucket.take(60, 0)
        for second in range(1, 50):
            assert bucket.take(1, second)
            assert not bucket.take(1, second)


class TestLimiter:
    def test_without_limits_nothing_is_counted_or_told(self) -> None:
        unlimited, _ = limiter()
        assert all(unlimited.admit(ANN, 10**12) == () for _ in range(1000))
        assert unlimited.headers(ANN) == ()
        unlimited.used(ANN, 10, 5)

    def test_exactly_the_limit_passes_at_once(self) -> None:
        limited, _ = limiter(requests=5)
        for _ in range(5):
            limited.admit(ANN, 1)
        with pytest.raises(RateLimited, match="5 requests per minute") as refusal:
            limited.admit(ANN, 1)
        assert refusal.value.retry_after == 12

    def test_every_key_has_its_own(self) -> None:
        limited, _ = limiter(requests=1)
        limited.admit(ANN, 1)
        limited.admit(BOB, 1)
        with pytest.raises(RateLimited):
            limited.admit(ANN, 1)

    def test_headers_tell_limit_rest_and_reset_of_the_limits_that_are_set(self) -> None:
        limited, clock = limiter(requests=6, tokens=600)
        assert dict(limited.admit(ANN, 100)) == {
            "x-ratelimit-limit-requests": "6",
            "x-ratelimit-remaining-requests": "5",
            "x-ratelimit-reset-requests": "10s",
            "x-ratelimit-limit-tokens": "600",
            "x-ratelimit-remaining-tokens": "500",
            "x-ratelimit-reset-tokens": "10s",
        }
        clock.advance(60)
        assert dict(limited.headers(ANN))["x-ratelimit-remaining-tokens"] == "600"
        only_tokens, _ = limiter(tokens=5)
        assert {name.rpartition("-")[2] for name, _ in only_tokens.admit(ANN, 1)} == {"tokens"}

    def test_a_refusal_tells_the_headers_too_and_takes_nothing(self) -> None:
        limited, _ = limiter(requests=10, tokens=100)
        limited.admit(ANN, 100)
        with pytest.raises(RateLimited, match="100 tokens per minute") as refusal:
            limited.admit(ANN, 50)
        headers = dict(refusal.value.headers)
        assert headers["x-ratelimit-remaining-requests"] == "9"
        assert headers["x-ratelimit-remaining-tokens"] == "0"
        assert refusal.value.retry_after == 30

    def test_unused_tokens_come_back(self) -> None:
        limited, _ = limiter(tokens=1000)
        limited.admit(ANN, 800)
        limited.used(ANN, 800, 100)
        assert dict(limited.headers(ANN))["x-ratelimit-remaining-tokens"] == "900"
        limited.admit(ANN, 900)

    @given(st.integers(1, 1000), st.integers(0, 3000), st.integers(0, 3000))
    def test_what_is_given_back_is_never_more_than_was_taken(
        self, capacity: int, ceiling: int, actual: int
    ) -> None:
        limited, _ = limiter(tokens=capacity)
        limited.admit(ANN, ceiling)
        limited.used(ANN, ceiling, actual)
        remaining = int(dict(limited.headers(ANN))["x-ratelimit-remaining-tokens"])
        assert remaining == max(capacity - max(actual, 0), capacity - min(ceiling, capacity))

    def test_a_request_beyond_any_minute_passes_when_the_bucket_is_full(self) -> None:
        limited, _ = limiter(tokens=100)
        limited.admit(ANN, 5000)
        with pytest.raises(RateLimited) as refusal:
            limited.admit(ANN, 5000)
        assert refusal.value.retry_after == 60

    def test_keys_that_are_at_rest_are_forgotten_when_there_are_many(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits_module, "MAX_KEYS", 10)
        limited, clock = limiter(requests=1)
        for number in range(100):
            limited.admit(Principal(account="ann", key_id=f"key-{number}"), 1)
            clock.advance(10)
            assert len(limited._buckets) <= 10

    def test_forgetting_frees_nobody_who_is_over_the_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits_module, "MAX_KEYS", 2)
        limited, _ = limiter(requests=1)
        limited.admit(ANN, 1)
        for number in range(10):
            limited.admit(Principal(account="x", key_id=f"other-{number}"), 1)
        with pytest.raises(RateLimited):
            limited.admit(ANN, 1)
