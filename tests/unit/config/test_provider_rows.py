"""[providers]: how an upstream is reached, and what is said when that cannot be."""

from pathlib import Path

import pytest

from headgate.bootstrap.gateway import model_specs
from headgate.config import ConfigError, Settings, load

ACME = '[providers.acme]\nkind = "openai"\nbase_url = "http://127.0.0.1:9/v1"\n'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str, **environ: str) -> Settings:
    Path("given.toml").write_text(text)
    return load(Path("given.toml"), environ)


def acme(*lines: str) -> str:
    """The provider with these lines instead of its own."""
    keys = {line.partition(" ")[0] for line in lines}
    kept = [line for line in ACME.splitlines() if line.partition(" ")[0] not in keys]
    return "\n".join([*kept, *lines, ""])


def test_everything_that_can_be_said_of_one() -> None:
    provider = read(
        acme(
            'variant = "azure"',
            'api_key_env = "ACME_KEY"',
            'headers = { X-Tenant = "a b", "X-Route" = "" }',
            'query = { api-version = "2026-01-01" }',
            "timeout_s = 20",
            "connect_timeout_s = 2",
            "first_byte_timeout_s = 30.5",
            "chunk_timeout_s = 10",
            "queue_wait_s = 0.5",
            'proxy_env = "ACME_PROXY"',
            'ca_file = "/absent/ca.pem"',
            'client_cert_file = "/absent/cert.pem"',
            'client_key_file = "/absent/key.pem"',
            'image_urls = "pass"',
        ),
        ACME_PROXY="http://user:secret@proxy.example:3128",
    ).providers["acme"]
    assert provider.headers == {"X-Tenant": "a b", "X-Route": ""}
    assert provider.query == {"api-version": "2026-01-01"}
    assert (provider.variant, provider.first_byte_timeout_s, provider.image_urls) == ("azure", 30.5, "pass")


BAD = [
    ('base_url = "http://"', "base_url", "name a host"),
    ('base_url = "http://acme:0/v1"', "base_url", "name a host"),
    ('base_url = "http://acme:99999/v1"', "base_url", "not a URL"),
    ('base_url = "http://[::1/v1"', "base_url", "not a URL"),
    ('base_url = "http://user:canary@acme/v1"', "base_url", "must not hold a name or password"),
    ('base_url = "http://acme/v1?api-version=1"', "base_url", "parameters belong to query"),
    ('api_key_env = ""', "api_key_env", "leave it out"),
    ('api_key_env = "ACME KEY"', "api_key_env", "name of an environment variable"),
    ('api_key_env = "sk-canary-0123"', "api_key_env", "name of an environment variable"),
    ('variant = "acmesoft"', "variant", "'acmesoft' is not one of"),
    ('variant = "groq"\nkind = "anthropic"', "variant", "belongs to the kind 'openai'"),
    ("connect_timeout_s = 0", "connect_timeout_s", "greater than 0"),
    ("first_byte_timeout_s = 601", "first_byte_timeout_s", "at most total_timeout_s"),
    ("chunk_timeout_s = nan", "chunk_timeout_s", "greater than 0"),
    ("total_timeout_s = 30", "timeout_s", "at most total_timeout_s"),
    ("queue_wait_s = 0", "queue_wait_s", "greater than 0"),
    ("queue_wait_s = inf", "queue_wait_s", "at most 3600"),
    ('proxy = "socks5://proxy"', "proxy", "http://"),
    ('proxy = "http://user:canary@proxy"', "proxy", "must not hold a name or password"),
    ('proxy = "http://a"\nproxy_env = "P"', "proxy_env", "either proxy or proxy_env"),
    ('proxy_env = "P"', "proxy_env", "the variable P must hold"),
    ('proxy_env = "NO_URL"', "proxy_env", "the variable NO_URL must hold"),
    ('proxy_env = "NO URL"', "proxy_env", "name of an environment variable"),
    ('headers = { "X Y" = "1" }', "headers", "'X Y' is not a header's name"),
    ('headers = { authorization = "canary" }', "headers", "authorization is set by the gateway itself"),
    ('headers = { Host = "canary" }', "headers", "Host is set"),
    ('headers = { "Content-Length" = "1" }', "headers", "Content-Length is set"),
    ('headers = { Api-Key = "canary" }', "headers", "Api-Key is set"),
    ('headers = { X-A = "1", x-a = "2" }', "headers", "x-a is given twice"),
    ('headers = { X-A = "canary\\r\\nHost: b" }', "headers", "plain ASCII"),
    ('headers = { X-A = "é" }', "headers", "plain ASCII"),
    ('query = { "" = "1" }', "query", "a name"),
    ('query = { a = "\\u0000" }', "query", "control characters"),
    ('client_cert_file = "/c.pem"', "client_cert_file", "needs client_key_file"),
    ('client_key_file = "/k.pem"', "client_key_file", "needs client_cert_file"),
    ('image_urls = "guess"', "image_urls", "guess"),
]


@pytest.mark.parametrize(
    ("lines", "key", "reason"), BAD, ids=[f"{i}-{case[1]}" for i, case in enumerate(BAD)]
)
def test_what_is_wrong_stops_the_start_and_shows_no_secret(lines: str, key: str, reason: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(acme(*lines.splitlines()), NO_URL="canary")
    file, told_key, told = str(error.value).split(": ", 2)
    assert (file, told_key) == ("given.toml", f"providers.acme.{key}")
    assert reason in told
    assert "canary" not in told


def test_a_key_that_is_not_there_stops_no_start() -> None:
    assert read(acme('api_key_env = "ACME_KEY"')).providers["acme"].api_key_env == "ACME_KEY"


def test_another_kind_in_a_built_in_providers_place_must_serve_its_models() -> None:
    other = ACME.replace("providers.acme", "providers.together").replace('"openai"', '"anthropic"')
    with pytest.raises(ConfigError) as error:
        read(other)
    told = str(error.value)
    assert told.startswith("given.toml: providers.together.kind: ")
    assert "llama-3.3" in told and "chat" in told


def test_another_kind_will_do_where_the_models_only_chat() -> None:
    settings = read(ACME.replace("providers.acme", "providers.anthropic"))
    model = next(spec for spec in model_specs(settings) if spec.name == "claude-opus-5-5")
    assert settings.providers["anthropic"].kind == "openai"
    assert model.takes_n and not model.tools


def test_loading_again_reads_what_the_file_says_now() -> None:
    assert read(ACME).providers["acme"].timeout_s == 60
    again = read(ACME + "timeout_s = 5\n")
    assert again.providers["acme"].timeout_s == 5
    with pytest.raises(ConfigError):
        read(ACME + "timeout_s = 0\n")
    assert read(ACME).models == again.models
