"""Who a credential belongs to, and for how long that is believed."""

import hashlib

import pytest
from tests.support.clock import ManualClock

from headgate.core.accounts import KeyRecord, Principal
from headgate.core.errors import InvalidCredentials, LedgerUnavailable, PermissionDenied
from headgate.service import identity as identity_module
from headgate.service.identity import MAX_CREDENTIAL, Identity, authorize
from headgate.service.tokens import Key, Tokens

KEY = "hg-0123456789abcdef0123456789abcdef"


class Accounts:
    """core.ports.AccountStore over two dictionaries; counts look-ups."""

    def __init__(self) -> None:
        self.keys: dict[bytes, KeyRecord] = {}
        self.accounts = {"ann"}
        self.revoked: set[str | None] = set()
        self.looked_up = 0
        self.out = False

    def add(self, key: str, **fields: object) -> None:
        digest = hashlib.sha256(key.encode()).digest()
        record = {"id": "key-1", "digest": digest, "prefix": key[:7], "account": "ann"} | fields
        self.keys[digest] = KeyRecord(**record)  # type: ignore[arg-type]

    async def key_by_digest(self, digest: bytes) -> KeyRecord | None:
        self._count()
        return self.keys.get(digest)

    async def token_state(self, account: str, jti: str | None) -> bool:
        self._count()
        return account in self.accounts and jti not in self.revoked

    def _count(self) -> None:
        self.looked_up += 1
        if self.out:
            raise LedgerUnavailable("out")


class House:
    def __init__(self) -> None:
        self.accounts = Accounts()
        self.accounts.add(KEY)
        self.tokens = Tokens("HS256", [Key(b"s" * 32)])
        self.clock = ManualClock()
        self.identity = Identity(self.accounts, self.tokens, self.clock)

    def token(self, ttl_s: int = 3600, account: str = "ann") -> str:
        return self.tokens.create(account, ttl_s, self.clock.time()).token


@pytest.fixture
def house() -> House:
    return House()


async def test_a_key_names_its_account_app_and_role(house: House) -> None:
    assert await house.identity.authenticate(KEY) == Principal(account="ann", key_id="key-1")
    house.accounts.add("hg-app", id="key-2", app="story", admin=True)
    expected = Principal(account="ann", key_id="key-2", app="story", admin=True)
    assert await house.identity.authenticate("hg-app") == expected


async def test_a_token_names_its_account_and_its_own_id(house: House) -> None:
    issued = house.tokens.create("ann", 60, house.clock.time())
    expected = Principal(account="ann", key_id=issued.jti, token=True)
    assert await house.identity.authenticate(issued.token) == expected


@pytest.mark.parametrize(
    "credential",
    [
        None, "", " ", "hg-", "hg-unknown", KEY + "x", KEY[:-1], KEY.upper(), "x" * (MAX_CREDENTIAL + 1),
        "hg-" + "x" * MAX_CREDENTIAL, "a.b.c", "\ud800", "hg-\ud800", "hg-\x00", "' OR 1=1 --",
    ],
)  # fmt: skip
async def test_everything_else_is_refused_with_the_same_words(house: House, credential: str | None) -> None:
    with pytest.raises(InvalidCredentials) as refusal:
        await house.identity.authenticate(credential)
    assert str(refusal.value) == str(InvalidCredentials())


async def test_an_absurdly_long_credential_is_not_even_looked_up(house: House) -> None:
    with pytest.raises(InvalidCredentials):
        await house.identity.authenticate("hg-" + "x" * MAX_CREDENTIAL)
    assert house.accounts.looked_up == 0


async def test_expired_revoked_and_orphaned_tokens_are_refused(house: House) -> None:
    expired = house.token(ttl_s=10)
    house.clock.advance(10)
    revoked = house.tokens.create("ann", 60, house.clock.time())
    house.accounts.revoked.add(revoked.jti)
    for token in (expired, revoked.token, house.token(account="nobody")):
        with pytest.raises(InvalidCredentials):
            await house.identity.authenticate(token)


async def test_a_record_whose_digest_differs_is_not_believed(house: House) -> None:
    digest = hashlib.sha256(b"hg-other").digest()
    house.accounts.keys[digest] = next(iter(house.accounts.keys.values()))
    with pytest.raises(InvalidCredentials):
        await house.identity.authenticate("hg-other")


async def test_where_only_tokens_count_a_key_is_refused_though_it_is_known(house: House) -> None:
    await house.identity.authenticate(KEY)
    with pytest.raises(InvalidCredentials):
        await house.identity.authenticate(KEY, tokens_only=True)
    assert (await house.identity.authenticate(house.token(), tokens_only=True)).token


class TestBelief:
    async def test_it_spares_look_ups_for_half_a_second(self, house: House) -> None:
        for _ in range(3):
            await house.identity.authenticate(KEY)
        house.clock.advance(0.49)
        await house.identity.authenticate(KEY)
        assert house.accounts.looked_up == 1
        house.clock.advance(0.01)
        await house.identity.authenticate(KEY)
        assert house.accounts.looked_up == 2

    async def test_a_revoked_key_works_no_longer_than_a_second(self, house: House) -> None:
        await house.identity.authenticate(KEY)
        house.accounts.keys.clear()
        house.clock.advance(1)
        with pytest.raises(InvalidCredentials):
            await house.identity.authenticate(KEY)

    async def test_a_refusal_is_not_remembered(self, house: House) -> None:
        with pytest.raises(InvalidCredentials):
            await house.identity.authenticate("hg-new")
        house.accounts.add("hg-new")
        assert (await house.identity.authenticate("hg-new")).account == "ann"

    async def test_one_credential_never_answers_for_another_that_begins_alike(self, house: House) -> None:
        token = house.token()
        await house.identity.authenticate(token)
        await house.identity.authenticate(KEY)
        for other in (token[:-1], token + "A", token[:-2] + "xx", KEY + "x"):
            with pytest.raises(InvalidCredentials):
                await house.identity.authenticate(other)

    async def test_what_is_remembered_is_bounded(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(identity_module, "CACHE_ENTRIES", 10)
        for number in range(100):
            house.accounts.add(f"hg-{number}")
            await house.identity.authenticate(f"hg-{number}")
            assert len(house.identity._known) <= 10

    async def test_a_database_that_is_out_is_no_admission(self, house: House) -> None:
        house.accounts.out = True
        for credential in (KEY, house.token()):
            with pytest.raises(LedgerUnavailable):
                await house.identity.authenticate(credential)


@pytest.mark.parametrize("dialect", ["openai", "thiggle", "genstack"])
def test_an_app_key_works_on_the_apps_routes_only(dialect: str) -> None:
    app_key = Principal(account="ann", key_id="k", app="story")
    authorize(app_key, "dify")
    with pytest.raises(PermissionDenied):
        authorize(app_key, dialect)
    plain = Principal(account="ann", key_id="k")
    authorize(plain, dialect)
    authorize(plain, "dify")
