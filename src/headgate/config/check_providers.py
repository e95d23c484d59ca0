"""What is checked of [providers]. Files and keys that are absent make models unavailable, they stop no start."""

import re
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from headgate.config.checks import Checks
from headgate.config.settings import MODEL_NAME, ConfigError, ProviderSettings
from headgate.config.variants import PLAIN, Variant, variant_of

VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
OURS = frozenset(
    {
        "accept-encoding",
        "api-key",
        "authorization",
        "connection",
        "content-length",
        "content-type",
        "host",
        "transfer-encoding",
        "x-api-key",
    }
)
"""Headers that the gateway itself sets: who asks, where to, and what comes."""


def check_provider(check: Checks, name: str, row: ProviderSettings, env: Mapping[str, str]) -> None:
    key = f"providers.{name}"
    if not MODEL_NAME.fullmatch(name):
        raise check.fail(key, "a provider's name is letters, digits and . _ : -")
    if row.kind == "embedded" or name == "embedded":
        raise check.fail(f"{key}.kind", "the embedded provider is built in; add rows to [[models]] instead")
    url = _http_url(check, f"{key}.base_url", row.base_url)
    if url.query or url.fragment:
        raise check.fail(f"{key}.base_url", "ends with the path; parameters belong to query")
    if row.api_key_env:
        _variable(check, f"{key}.api_key_env", row.api_key_env)
    variant = check_variant(check, key, row)
    _times(check, key, row)
    if row.max_concurrency < 1:
        raise check.fail(f"{key}.max_concurrency", "must be at least 1")
    _proxy(check, key, row, env)
    _headers(check, f"{key}.headers", row.headers, variant.auth)
    for parameter, value in row.query.items():
        if not parameter or CONTROLS.search(parameter + value):
            raise check.fail(f"{key}.query", f"{parameter!r}: a name and a value without control characters")
    if bool(row.client_cert_file) != bool(row.client_key_file):
        given, missing = ("client_cert_file", "client_key_file")
        if row.client_key_file:
            given, missing = missing, given
        raise check.fail(f"{key}.{given}", f"needs {missing} too")


def check_variant(check: Checks, key: str, row: ProviderSettings) -> Variant:
    if row.variant and row.kind != "openai":
        raise check.fail(f"{key}.variant", f"belongs to the kind 'openai', not to {row.kind!r}")
    if row.kind != "openai":
        return PLAIN
    try:
        return variant_of(row)
    except ConfigError as error:
        raise check.fail(f"{key}.variant", str(error).removeprefix("variant: ")) from None


def _times(check: Checks, key: str, row: ProviderSettings) -> None:
    for name in ("timeout_s", "connect_timeout_s", "first_byte_timeout_s", "chunk_timeout_s"):
        seconds = getattr(row, name)
        if seconds is not None and not 0 < seconds <= row.total_timeout_s:
            raise check.fail(f"{key}.{name}", "must be greater than 0 and at most total_timeout_s")
    check.seconds(f"{key}.queue_wait_s", row.queue_wait_s)


def _proxy(check: Checks, key: str, row: ProviderSettings, env: Mapping[str, str]) -> None:
    if row.proxy and row.proxy_env:
        raise check.fail(f"{key}.proxy_env", "give either proxy or proxy_env")
    if row.proxy:
        _http_url(check, f"{key}.proxy", row.proxy)
    if row.proxy_env:
        _variable(check, f"{key}.proxy_env", row.proxy_env)
        # Unlike a missing key: calls that leave round the proxy would go where the operator does not want them.
        if not _holds_url(env.get(row.proxy_env, "")):
            raise check.fail(
                f"{key}.proxy_env", f"the variable {row.proxy_env} must hold an http:// or https:// URL"
            )


def _headers(check: Checks, key: str, headers: Mapping[str, str], auth: str) -> None:
    seen: set[str] = set()
    for name, value in headers.items():
        if not HEADER_NAME.fullmatch(name):
            raise check.fail(key, f"{name!r} is not a header's name")
        if name.lower() in OURS or name.lower() == auth.lower():
            raise check.fail(key, f"{name} is set by the gateway itself")
        if name.lower() in seen:
            raise check.fail(key, f"{name} is given twice")
        seen.add(name.lower())
        if CONTROLS.search(value) or not value.isascii() or value != value.strip():
            raise check.fail(key, f"{name}: the value must be plain ASCII text")


def _http_url(check: Checks, key: str, text: str) -> SplitResult:
    """The URL's parts; without a password, which would not stay out of logs and messages."""
    try:
        url = urlsplit(text)
        is_http = _is_http(url)
    except ValueError:
        raise check.fail(key, "is not a URL") from None
    if not is_http:
        raise check.fail(key, "must start with http:// or https:// and name a host")
    if url.username is not None or url.password is not None:
        raise check.fail(key, "must not hold a name or password")
    return url


def _holds_url(text: str) -> bool:
    try:
        return _is_http(urlsplit(text))
    except ValueError:
        return False


def _is_http(url: SplitResult) -> bool:
    """ValueError for a port that is none."""
    return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0


def _variable(check: Checks, key: str, name: str) -> None:
    # Not shown: what does not look like a variable's name may well be the key itself.
    if not VARIABLE_NAME.fullmatch(name):
        raise check.fail(key, "must be the name of an environment variable: letters, digits and _")
