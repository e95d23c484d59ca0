"""Checks that types alone do not make; each failure names the file, the key and the reason."""

import math
from collections.abc import Mapping
from decimal import Decimal

from headgate.config.settings import (
    BillingSettings,
    ConfigError,
    EmbeddedSettings,
    FileSettings,
    LimitSettings,
    Margins,
    RoutingSettings,
    ServerSettings,
    TokenSettings,
)
from headgate.core import money
from headgate.core.money import MarginPPM

LONGEST_KEPT_S = 366 * 24 * 3600.0


class Checks:
    """`source` is the file that the settings come from."""

    def __init__(self, source: str) -> None:
        self.source = source

    def fail(self, key: str, reason: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key}: {reason}")

    def decimal(self, key: str, text: str) -> Decimal:
        try:
            return money.decimal(text)
        except ValueError as error:
            raise self.fail(key, str(error)) from None

    def percent(self, key: str, text: str) -> MarginPPM:
        try:
            return money.margin_ppm(self.decimal(key, text))
        except ValueError as error:
            raise self.fail(key, str(error)) from None

    def price(self, key: str, text: str) -> None:
        try:
            money.rate(self.decimal(key, text))
        except ValueError as error:
            raise self.fail(key, str(error)) from None

    def count(self, key: str, value: int, low: int, high: int) -> None:
        if not low <= value <= high:
            raise self.fail(key, f"must be {low} to {high}")

    def seconds(self, key: str, value: float, most: float = 3600) -> None:
        if not 0 < value <= most:
            raise self.fail(key, f"must be greater than 0 and at most {most:.0f} seconds")

    def margins(self, billing: BillingSettings) -> Margins:
        default = self.percent("billing.gross_margin_percent", billing.gross_margin_percent)
        cap = self.percent("billing.max_gross_margin_percent", billing.max_gross_margin_percent)
        floor = None
        if billing.min_gross_margin_percent is not None:
            floor = self.percent("billing.min_gross_margin_percent", billing.min_gross_margin_percent)
        share = self.decimal("billing.platform_share_percent", billing.platform_share_percent)
        if not 0 <= share <= 100:
            raise self.fail("billing.platform_share_percent", "must be 0 to 100")
        if default > cap:
            raise self.fail("billing.gross_margin_percent", "is above max_gross_margin_percent")
        if floor is not None and floor > cap:
            raise self.fail("billing.min_gross_margin_percent", "is above max_gross_margin_percent")
        return Margins(default=default, floor=floor, cap=cap, platform_share_percent=share)

    def credit(self, billing: BillingSettings) -> Decimal:
        credit = self.decimal("billing.credit_usd", billing.credit_usd)
        try:
            money.Credits(credit)
        except ValueError as error:
            raise self.fail("billing.credit_usd", str(error)) from None
        return credit

    def server(self, server: ServerSettings) -> None:
        for key in ("first_chunk_wait_s", "ping_interval_s", "drain_deadline_s", "write_timeout_s"):
            self.seconds(f"server.{key}", getattr(server, key))
        for key in ("max_body_bytes", "max_choices", "max_models", "max_stops"):
            if getattr(server, key) < 1:
                raise self.fail(f"server.{key}", "must be at least 1")
        if server.public_url and not server.public_url.startswith(("http://", "https://")):
            raise self.fail("server.public_url", "must start with http:// or https://")

    def embedded(self, embedded: EmbeddedSettings) -> None:
        for key, low, high in (("slots", 1, 64), ("threads", 1, 256), ("max_queue", 0, 100_000)):
            self.count(f"embedded.{key}", getattr(embedded, key), low, high)

    def limits(self, limits: LimitSettings) -> None:
        for key in ("requests_per_minute", "tokens_per_minute"):
            if getattr(limits, key) < 0:
                raise self.fail(f"limits.{key}", "must be 0 (none) or more")

    def routing(self, routing: RoutingSettings) -> None:
        for key, low, high in (
            ("retries", 0, 10),
            ("breaker_failures", 0, 10_000),
            ("breaker_error_percent", 1, 100),
            ("breaker_calls", 1, 10_000),
        ):
            self.count(f"routing.{key}", getattr(routing, key), low, high)
        for key in ("deadline_s", "retry_wait_s", "retry_max_wait_s", "breaker_open_s"):
            self.seconds(f"routing.{key}", getattr(routing, key))
        if routing.retry_wait_s > routing.retry_max_wait_s:
            raise self.fail("routing.retry_wait_s", "is above retry_max_wait_s")

    def files(self, files: FileSettings) -> None:
        if files.max_bytes < 1:
            raise self.fail("files.max_bytes", "must be at least 1")
        if files.max_total_bytes < files.max_bytes:
            raise self.fail("files.max_total_bytes", "is below max_bytes")
        if files.account_bytes < files.max_bytes:
            raise self.fail("files.max_account_bytes", "is below max_bytes")
        if files.account_bytes > files.max_total_bytes:
            raise self.fail("files.max_account_bytes", "is above max_total_bytes")
        self.seconds("files.keep_s", files.keep_s, LONGEST_KEPT_S)

    def tokens(self, tokens: TokenSettings, env: Mapping[str, str]) -> None:
        symmetric = tokens.algorithm == "HS256"
        files = [key for key in ("public_key_file", "jwks_file") if getattr(tokens, key)]
        if symmetric and files:
            raise self.fail(f"tokens.{files[0]}", "belongs to RS256 and ES256, not to HS256")
        if not symmetric and len(files) != 1:
            raise self.fail(
                "tokens.public_key_file", f"{tokens.algorithm} needs public_key_file or jwks_file"
            )
        if not symmetric and tokens.secret_env:
            raise self.fail("tokens.secret_env", "belongs to HS256")
        if tokens.secret_env and len(env.get(tokens.secret_env, "").encode()) < 32:
            raise self.fail(
                "tokens.secret_env",
                f"the variable {tokens.secret_env} must hold a secret of at least 32 bytes",
            )


def is_numeric(text: object) -> bool:
    try:
        return isinstance(text, str) and math.isfinite(float(text))
    except ValueError:
        return False
