"""An operator's settings made into connections to one service, or the reason why that cannot be."""

import re
from collections.abc import Mapping

from yarl import URL

from headgate.config import ConfigError, ProviderSettings
from headgate.providers.egress.service import Http, Timeouts
from headgate.providers.egress.tls import tls_context

OURS = frozenset(
    {
        "accept-encoding",
        "connection",
        "content-encoding",
        "content-length",
        "content-type",
        "expect",
        "host",
        "keep-alive",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Headers that frame the request, or say what we can read: another value would break the connection."""

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def connect(name: str, settings: ProviderSettings, headers: Mapping[str, str], proxy: str | None) -> Http:
    """The connections to the service called `name`. `headers` carry the key; `proxy` comes before the settings' own.

    ConfigError naming the setting and what is wrong with it.
    """
    key = f"providers.{name}"
    base = _service(f"{key}.base_url", settings.base_url)
    silence = settings.timeout_s
    timeouts = Timeouts(
        connect_s=_either(settings.connect_timeout_s, silence),
        first_byte_s=_either(settings.first_byte_timeout_s, silence),
        chunk_s=_either(settings.chunk_timeout_s, silence),
        total_s=settings.total_timeout_s,
    )
    return Http(
        name,
        base,
        _headers(f"{key}.headers", settings.headers, headers),
        timeouts=timeouts,
        max_concurrency=settings.max_concurrency,
        queue_wait_s=settings.queue_wait_s,
        query=settings.query,
        proxy=_proxy(key, settings, proxy),
        tls=tls_context(key, settings),
    )


def _either(own: float | None, silence: float) -> float:
    return silence if own is None else own


def _service(key: str, base_url: str) -> str:
    url = _url(base_url)
    if url is None:
        raise ConfigError(f"{key}: must be an http:// or https:// URL")
    if "@" in url.raw_authority:
        raise ConfigError(f"{key}: must hold no user name or password; use api_key_env or headers")
    if "#" in base_url:
        raise ConfigError(f"{key}: must have no fragment")
    return base_url


def _proxy(key: str, settings: ProviderSettings, proxy: str | None) -> str:
    if settings.proxy_env and not proxy:  # never past a proxy that was asked for
        raise ConfigError(f"set {settings.proxy_env}")
    if not proxy and not settings.proxy:
        return ""
    # What a variable holds is not shown: it may be a password.
    where = f"the variable {settings.proxy_env}" if settings.proxy_env else f"{key}.proxy"
    chosen = proxy or settings.proxy
    if _url(chosen) is None:
        raise ConfigError(f"{where}: must be the http:// or https:// URL of a proxy")
    return chosen


def _headers(key: str, static: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The operator's headers and the key's, which wins where both name one."""
    for header, value in static.items():
        if not _TOKEN.fullmatch(header):
            raise ConfigError(f"{key}: {header!r} is no name of a header")
        if header.lower() in OURS:
            raise ConfigError(f"{key}: {header} is the gateway's own to send")
        if not (value.isascii() and value.isprintable()):
            raise ConfigError(f"{key}.{header}: must be printable ASCII characters")
    keys = {header.lower() for header in own}
    return {header: value for header, value in static.items() if header.lower() not in keys} | dict(own)


def _url(text: str) -> URL | None:
    try:
        url = URL(text)
    except ValueError:
        return None
    return url if url.scheme in ("http", "https") and url.raw_host else None
