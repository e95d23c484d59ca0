import hashlib
import re
from types import SimpleNamespace
from typing import Any

import jwt
import pytest

from headgate.core.accounts import Balance, KeyRecord, LedgerReport, UsageRecord
from headgate.core.errors import InvalidRequest, NotFound
from headgate.core.money import NanoUSD
from headgate.service.accounts import Administration
from headgate.service.tokens import Key, Tokens

NOW = 1_800_000_000.5
NOW_MS = 1_800_000_000_500
REPORT = LedgerReport(transfers=0, open_holds=0, held=0, problems=())


class Memory:
    """Accounts and credentials in dictionaries."""

    def __init__(self) -> None:
        self.balances: dict[str, int] = {"ann": 0, "platform": 9}
        self.records: list[KeyRecord] = []
        self.revoked: list[tuple[Any, ...]] = []

    def create(self, name: str, credit: NanoUSD | None, created_ms: int) -> Balance:
        assert created_ms == NOW_MS
        self.balances[name] = credit or 0
        return self.balance(name)

    def credit(self, name: str, amount: NanoUSD, created_ms: int) -> Balance:
        assert created_ms == NOW_MS
        self.balances[name] += amount
        return self.balance(name)

    def balance(self, name: str) -> Balance:
        if name not in self.balances:
            raise NotFound("no such account")
        return Balance(account=name, balance=self.balances[name], held=0)

    def require_client(self, name: str) -> None:
        if name == "platform":
            raise NotFound("no such account")
        self.balance(name)

    def add_key(self, record: KeyRecord) -> None:
        self.require_client(record.account)
        self.records.append(record)

    def keys(self) -> tuple[KeyRecord, ...]:
        return tuple(self.records)

    def revoke_key(self, key_id: str, digest: bytes, revoked_ms: int) -> str:
        for record in self.records:
            if key_id == record.id or digest == record.digest:
                return record.id
        raise NotFound("no such key")

    def revoke_token(self, jti: str, account: str | None, expires_ms: int | None, revoked_ms: int) -> None:
        self.revoked.append((jti, account, expires_ms, revoked_ms))

    def usage(self, account: str | None, limit: int | None) -> tuple[UsageRecord, ...]:
        return ()


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def tokens() -> Tokens:
    return Tokens("HS256", [Key(b"s" * 32)])


@pytest.fixture
def administration(memory: Memory, tokens: Tokens) -> Administration:
    return Administration(
        accounts=memory,
        credentials=memory,
        usage=memory.usage,
        audit=lambda: REPORT,
        tokens=lambda: tokens,
        apps=["default", "story"],
        clock=SimpleNamespace(time=lambda: NOW, monotonic=lambda: 0.0),
    )


def test_accounts_are_created_credited_and_shown(administration: Administration) -> None:
    assert administration.create_account("bob", NanoUSD(5)).balance == 5
    assert administration.credit("bob", NanoUSD(2)).balance == 7
    assert administration.balance("bob").balance == 7


@pytest.mark.parametrize("name", ["", "a" * 65, "a b", "provider:x", "ä", "ann\n", "platform", "funding"])
def test_bad_and_reserved_names_make_no_account(administration: Administration, name: str) -> None:
    with pytest.raises(InvalidRequest):
        administration.create_account(name)


def test_a_key_has_256_random_bits_and_only_its_digest_is_kept(
    administration: Administration, memory: Memory
) -> None:
    minted = administration.create_key("ann", app="story", admin=True)
    assert re.fullmatch(r"hg-[A-Za-z0-9_-]{43}", minted.key)
    (record,) = memory.records
    assert record == minted.record
    assert record.digest == hashlib.sha256(minted.key.encode()).digest()
    assert (record.account, record.app, record.admin, record.created_ms) == ("ann", "story", True, NOW_MS)
    assert minted.key.startswith(record.prefix) and len(record.prefix) < 10
    assert administration.create_key("ann").key != minted.key


def test_keys_for_unknown_accounts_and_apps_are_refused(administration: Administration) -> None:
    with pytest.raises(NotFound):
        administration.create_key("nobody")
    with pytest.raises(NotFound, match="default, story"):
        administration.create_key("ann", app="nope")


def test_a_key_is_revoked_by_its_id_or_by_itself(administration: Administration) -> None:
    minted = administration.create_key("ann")
    assert administration.revoke_key(minted.record.id) == minted.record.id
    assert administration.revoke_key(minted.key) == minted.record.id
    with pytest.raises(NotFound):
        administration.revoke_key(minted.record.prefix)


def test_a_token_is_created_for_clients_and_revoked_by_itself_or_by_its_id(
    administration: Administration, memory: Memory, tokens: Tokens
) -> None:
    issued = administration.create_token("ann", 60)
    assert tokens.verify(issued.token, NOW).jti == issued.jti
    assert administration.revoke_token(issued.token) == issued.jti
    assert administration.revoke_token("some.other-id") == "some.other-id"
    assert memory.revoked == [
        (issued.jti, "ann", issued.expires_at * 1000, NOW_MS),
        ("some.other-id", None, None, NOW_MS),
    ]
    for account in ("nobody", "platform"):
        with pytest.raises(NotFound):
            administration.create_token(account, 60)


def test_tokens_that_cannot_be_revoked_are_named_as_such(
    administration: Administration, memory: Memory, tokens: Tokens
) -> None:
    expired = tokens.create("ann", 60, NOW - 100).token
    without_id = jwt.encode({"sub": "ann", "exp": NOW + 60}, b"s" * 32, algorithm="HS256")
    for token, reason in (
        (expired, "expired already"),
        (without_id, "no id"),
        ("", "1 to 255"),
        ("a\n", "1 to 255"),
    ):
        with pytest.raises(InvalidRequest, match=reason):
            administration.revoke_token(token)
    assert memory.revoked == []


def test_usage_of_an_unknown_account_is_an_error(administration: Administration) -> None:
    assert administration.usage() == administration.usage("ann", 5) == ()
    with pytest.raises(NotFound):
        administration.usage("nobody")


def test_the_audit_is_passed_through(administration: Administration) -> None:
    assert administration.audit() is REPORT
