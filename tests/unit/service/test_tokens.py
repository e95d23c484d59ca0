import base64
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from msgspec import structs

from headgate.bootstrap.token_keys import load_tokens, stored_secret
from headgate.config import ConfigError, Settings, TokenSettings, load
from headgate.core.errors import InvalidCredentials, InvalidRequest
from headgate.service.tokens import Claims, Key, Tokens

SECRET = b"s" * 32
NOW = 1_800_000_000.0

tokens = Tokens("HS256", [Key(SECRET)])


def signed(claims: dict[str, Any], headers: dict[str, Any] | None = None, secret: bytes = SECRET) -> str:
    return jwt.encode(claims, secret, algorithm="HS256", headers=headers)


def unsigned(header: dict[str, Any], claims: dict[str, Any], signature: str = "") -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    return f"{part(header)}.{part(claims)}.{signature}"


GOOD: dict[str, Any] = {"sub": "ann", "exp": NOW + 60}


def test_a_created_token_says_who_until_when() -> None:
    issued = tokens.create("ann", 60, NOW)
    assert issued.expires_at == NOW + 60
    claims = tokens.verify(issued.token, NOW + 59)
    assert claims == Claims(sub="ann", jti=issued.jti, exp=issued.expires_at)
    with pytest.raises(InvalidCredentials):
        tokens.verify(issued.token, NOW + 60)


def test_two_tokens_never_share_an_id() -> None:
    assert tokens.create("ann", 60, NOW).jti != tokens.create("ann", 60, NOW).jti


def test_a_token_id_is_optional() -> None:
    assert tokens.verify(signed(GOOD), NOW) == Claims(sub="ann", jti=None, exp=int(NOW) + 60)


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": NOW + 60},
        {"sub": "ann"},
        {**GOOD, "exp": NOW},
        {**GOOD, "exp": str(NOW + 60)},
        {**GOOD, "exp": True},
        {**GOOD, "exp": None},
        {**GOOD, "exp": [NOW + 60]},
        {**GOOD, "exp": float("inf")},
        {**GOOD, "exp": float("nan")},
        {**GOOD, "exp": 10**400},
        {**GOOD, "nbf": NOW + 1},
        {**GOOD, "nbf": "soon"},
        {**GOOD, "sub": ""},
        {**GOOD, "sub": "a b"},
        {**GOOD, "sub": "a" * 65},
        {**GOOD, "sub": "provider:acme"},
        {**GOOD, "sub": "ann\n"},
        {**GOOD, "jti": ""},
        {**GOOD, "jti": "j" * 256},
        {**GOOD, "jti": "\ud800"},
        {**GOOD, "aud": "somebody else"},
    ],
    ids=repr,
)
def test_wrong_claims_are_invalid_credentials(claims: dict[str, Any]) -> None:
    with pytest.raises(InvalidCredentials):
        tokens.verify(signed(claims), NOW)


@pytest.mark.parametrize("claim", ["sub", "jti"])
@pytest.mark.parametrize("value", [7, ["ann"], {"a": 1}, True])
def test_names_that_are_no_strings_are_invalid_credentials(claim: str, value: object) -> None:
    # PyJWT would refuse to encode these.
    import hashlib
    import hmac

    body = unsigned({"alg": "HS256", "typ": "JWT"}, {**GOOD, claim: value})[:-1]
    mac = hmac.digest(SECRET, body.encode(), hashlib.sha256)
    token = f"{body}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    with pytest.raises(InvalidCredentials):
        tokens.verify(token, NOW)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "ey",
        "a.b.c",
        "....",
        "ey\ud800.b.c",
        "ключ.b.c",
        "e" * 9000,
        unsigned({"alg": "none"}, GOOD),
        unsigned({"alg": "None"}, GOOD, "AAAA"),
        unsigned({"alg": "HS256"}, GOOD, "AAAA"),
        unsigned({"alg": ["HS256"]}, GOOD, "AAAA"),
        unsigned({}, GOOD, "AAAA"),
        signed(GOOD, secret=b"t" * 32),
        signed(GOOD, {"crit": ["exp"], "exp": 1}),
        signed(GOOD, {"crit": ["b64"], "b64": True}),
        signed(GOOD, {"crit": []}),
        jwt.encode(GOOD, b"s" * 64, algorithm="HS512"),
    ],
)
def test_malformed_unsigned_and_swapped_tokens_are_invalid_credentials(token: str) -> None:
    with pytest.raises(InvalidCredentials):
        tokens.verify(token, NOW)


@pytest.mark.parametrize("payload", [b"[]", b"7", b'"ann"', b"not json", b"[" * 5000])
def test_payloads_that_are_no_object_are_invalid_credentials(payload: bytes) -> None:
    token = jwt.api_jws.encode(payload, SECRET, algorithm="HS256")
    with pytest.raises(InvalidCredentials):
        tokens.verify(token, NOW)


@pytest.mark.parametrize("keys", [[], [Key(b"")], [Key(b"s" * 31)]])
def test_short_and_missing_secrets_are_refused(keys: list[Key]) -> None:
    with pytest.raises(ValueError, match="HS256"):
        Tokens("HS256", keys)


@dataclass
class Pair:
    """A private key, and its public half as PEM and as JWK."""

    private: Any
    algorithm: str

    @property
    def pem(self) -> bytes:
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        pem: bytes = self.private.public_key().public_bytes(encoding, form)
        return pem

    def jwk(self, **fields: Any) -> dict[str, Any]:
        to_jwk: Any = jwt.get_algorithm_by_name(self.algorithm).to_jwk
        return {**to_jwk(self.private.public_key(), as_dict=True), **fields}

    def sign(self, claims: dict[str, Any], **headers: Any) -> str:
        return jwt.encode(claims, self.private, algorithm=self.algorithm, headers=headers)


@pytest.fixture(scope="module")
def rsa_pair() -> Pair:
    return Pair(rsa.generate_private_key(65537, 2048), "RS256")


@pytest.fixture(scope="module")
def ec_pair() -> Pair:
    return Pair(ec.generate_private_key(ec.SECP256R1()), "ES256")


@pytest.fixture
def configured(tmp_path: Path) -> Settings:
    return load(None, {"HEADGATE_DATA_DIR": str(tmp_path / "data")})


def with_tokens(settings: Settings, **fields: Any) -> Settings:
    return structs.replace(settings, tokens=TokenSettings(**fields))


@pytest.mark.parametrize("name", ["rsa_pair", "ec_pair"])
def test_a_public_key_file_verifies_and_never_signs(
    name: str, request: pytest.FixtureRequest, configured: Settings, tmp_path: Path
) -> None:
    pair: Pair = request.getfixturevalue(name)
    (tmp_path / "key.pem").write_bytes(pair.pem)
    loaded = load_tokens(
        with_tokens(configured, algorithm=pair.algorithm, public_key_file=str(tmp_path / "key.pem"))
    )
    assert loaded.verify(pair.sign(GOOD), NOW).sub == "ann"
    # The classic swap: HMAC with the public key's text as the secret.
    import hashlib
    import hmac

    body = unsigned({"alg": "HS256"}, GOOD)[:-1]
    mac = base64.urlsafe_b64encode(hmac.digest(pair.pem, body.encode(), hashlib.sha256)).rstrip(b"=")
    for forged in (f"{body}.{mac.decode()}", signed(GOOD), unsigned({"alg": "none"}, GOOD)):
        with pytest.raises(InvalidCredentials):
            loaded.verify(forged, NOW)
    with pytest.raises(InvalidRequest, match="elsewhere"):
        loaded.create("ann", 60, NOW)
    assert not (tmp_path / "data" / "jwt.secret").exists()


def test_a_jwks_file_picks_the_key_by_its_id(
    rsa_pair: Pair, ec_pair: Pair, configured: Settings, tmp_path: Path
) -> None:
    other = Pair(ec.generate_private_key(ec.SECP256R1()), "ES256")
    keys = [
        rsa_pair.jwk(kid="r", alg="RS256"),
        other.jwk(kid="enc", use="enc"),
        ec_pair.jwk(kid="a", use="sig"),
        Pair(ec.generate_private_key(ec.SECP256R1()), "ES256").jwk(kid="b"),
    ]
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": keys}))
    loaded = load_tokens(with_tokens(configured, algorithm="ES256", jwks_file=str(tmp_path / "jwks.json")))
    assert loaded.verify(ec_pair.sign(GOOD, kid="a"), NOW).sub == "ann"
    assert loaded.verify(ec_pair.sign(GOOD), NOW).sub == "ann"
    for refused in (
        ec_pair.sign(GOOD, kid="b"),
        ec_pair.sign(GOOD, kid="unknown"),
        other.sign(GOOD, kid="enc"),
        rsa_pair.sign(GOOD, kid="r"),
    ):
        with pytest.raises(InvalidCredentials):
            loaded.verify(refused, NOW)


def test_key_files_that_do_not_fit_stop_the_start_with_key_and_reason(
    rsa_pair: Pair, ec_pair: Pair, configured: Settings, tmp_path: Path
) -> None:
    weak = Pair(rsa.generate_private_key(65537, 1024), "RS256")
    p384 = Pair(ec.generate_private_key(ec.SECP384R1()), "ES256")
    private = rsa_pair.private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = tmp_path / "key.pem"
    for algorithm, content in (
        ("RS256", ec_pair.pem),
        ("ES256", rsa_pair.pem),
        ("RS256", weak.pem),
        ("ES256", p384.pem),
        ("RS256", private),
        ("RS256", b"not a key"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"tokens\.public_key_file: .*key\.pem: "):
            load_tokens(with_tokens(configured, algorithm=algorithm, public_key_file=str(file)))
    with pytest.raises(ConfigError, match="No such file"):
        load_tokens(with_tokens(configured, algorithm="RS256", public_key_file=str(tmp_path / "none")))
    for text in ("nonsense", "{}", '{"keys": []}', json.dumps({"keys": [rsa_pair.jwk()]})):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"tokens\.jwks_file"):
            load_tokens(with_tokens(configured, algorithm="ES256", jwks_file=str(file)))


def test_the_secret_comes_from_the_environment_when_it_is_named(tmp_path: Path) -> None:
    config = tmp_path / "headgate.toml"
    config.write_text('[tokens]\nsecret_env = "JWT_SECRET"\n')
    environ = {"HEADGATE_DATA_DIR": str(tmp_path / "data"), "JWT_SECRET": SECRET.decode()}
    assert load_tokens(load(config, environ)).verify(signed(GOOD), NOW).sub == "ann"
    assert not (tmp_path / "data").exists()


def test_the_generated_secret_is_private_and_stays(configured: Settings) -> None:
    issued = load_tokens(configured).create("ann", 60, NOW)
    assert load_tokens(configured).verify(issued.token, NOW).jti == issued.jti
    file = configured.data_dir / "jwt.secret"
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(file.read_bytes()) == 64
    assert [path.name for path in configured.data_dir.iterdir()] == ["jwt.secret"]


def test_an_emptied_secret_file_stops_the_start(configured: Settings) -> None:
    configured.data_dir.mkdir()
    (configured.data_dir / "jwt.secret").touch()
    with pytest.raises(ConfigError, match=r"jwt\.secret: HS256 needs a secret of at least 32 bytes"):
        load_tokens(configured)


def test_processes_that_need_the_secret_at_once_get_the_same(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from headgate.bootstrap.token_keys import stored_secret; sys.stdin.read();"
        "print(stored_secret(pathlib.Path(sys.argv[1])).decode())"
    )
    path = tmp_path / "data" / "jwt.secret"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
    secrets = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert secrets == {stored_secret(path)}
