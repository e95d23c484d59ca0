"""Requests and tokens per minute, per key, in this process's memory.

Token buckets: a key may burst up to a minute's worth and regains it evenly. Tokens are taken for the greatest
possible use before the call and what was not used is given back after it.
"""

import math

from headgate.config import LimitSettings
from headgate.core.accounts import Principal
from headgate.core.errors import RateLimited
from headgate.core.ports import Clock

MAX_KEYS = 50_000
"""Full buckets are forgotten beyond this many keys; they would start full again anyway."""

ROUNDING = 1e-6
"""Of a unit: who waited as long as told is not refused for what floats lose."""


class Bucket:
    """`capacity` units, refilled evenly within a minute."""

    __slots__ = ("_at", "_level", "capacity")

    def __init__(self, capacity: int, now: float) -> None:
        self.capacity = capacity
        self._level = float(capacity)
        self._at = now

    def level(self, now: float) -> float:
        self._level = min(self.capacity, self._level + (now - self._at) * self.capacity / 60)
        self._at = now
        return self._level

    def take(self, units: int, now: float) -> bool:
        """Take units if they are there. More than the capacity counts as the capacity."""
        wanted = min(units, self.capacity)
        if self.level(now) < wanted - ROUNDING:
            return False
        self._level = max(0.0, self._level - wanted)
        return True

    def give_back(self, units: int, now: float) -> None:
        self._level = min(self.capacity, self.level(now) + units)

    def wait(self, units: int, now: float) -> int:
        """Whole seconds until `units` are there, from 1 to 120."""
        missing = min(units, self.capacity) - self.level(now)
        return max(1, min(120, math.ceil(missing * 60 / self.capacity)))

    def full_in(self, now: float) -> int:
        return math.ceil((self.capacity - self.level(now)) * 60 / self.capacity)


class Limiter:
    def __init__(self, settings: LimitSettings, clock: Clock) -> None:
        self._limits = {
            name: limit
            for name, limit in (
                ("requests", settings.requests_per_minute),
                ("tokens", settings.tokens_per_minute),
            )
            if limit
        }
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def admit(self, principal: Principal, tokens: int) -> tuple[tuple[str, str], ...]:
        """Let one request of at most `tokens` through; returns the rate-limit headers. RateLimited if not now."""
        if not self._limits:
            return ()
        now = self._clock.monotonic()
        taken: list[tuple[Bucket, int]] = []
        for name, limit in self._limits.items():
            bucket = self._bucket(principal.key_id, name, limit, now)
            units = 1 if name == "requests" else tokens
            if not bucket.take(units, now):
                for earlier, amount in taken:
                    earlier.give_back(amount, now)
                raise RateLimited(
                    f"The limit of {limit} {name} per minute for this key is reached.",
                    retry_after=bucket.wait(units, now),
                    headers=self.headers(principal),
                )
            taken.append((bucket, units))
        return self.headers(principal)

    def used(self, principal: Principal, ceiling: int, actual: int) -> None:
        """Give back the tokens of the ceiling that were not used."""
        bucket = self._buckets.get((principal.key_id, "tokens"))
        if bucket is not None:
            bucket.give_back(max(0, min(ceiling, bucket.capacity) - actual), self._clock.monotonic())

    def headers(self, principal: Principal) -> tuple[tuple[str, str], ...]:
        """x-ratelimit-{limit,remaining,reset}-{requests,tokens} for the limits that are set."""
        now = self._clock.monotonic()
        headers: list[tuple[str, str]] = []
        for name, limit in self._limits.items():
            bucket = self._bucket(principal.key_id, name, limit, now)
            headers.append((f"x-ratelimit-limit-{name}", str(limit)))
            headers.append((f"x-ratelimit-remaining-{name}", str(int(bucket.level(now) + ROUNDING))))
            headers.append((f"x-ratelimit-reset-{name}", f"{bucket.full_in(now)}s"))
        return tuple(headers)

    def _bucket(self, key_id: str, name: str, limit: int, now: float) -> Bucket:
        bucket = self._buckets.get((key_id, name))
        if bucket is None:
            if len(self._buckets) >= MAX_KEYS:
                self._forget_full(now)
            bucket = self._buckets[key_id, name] = Bucket(limit, now)
        return bucket

    def _forget_full(self, now: float) -> None:
        self._buckets = {key: bucket for key, bucket in self._buckets.items() if bucket.full_in(now) > 0}
