"""`headgate serve` from settings to exit: gateway, server, demo account, the lines on stdout."""

import asyncio
import gc
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import structlog
import uvloop
from msgspec import Struct

from headgate import logs
from headgate.bootstrap import administration
from headgate.bootstrap.gateway import open_gateway
from headgate.bootstrap.reloading import Hangups, Reloading
from headgate.config import ConfigError, Settings
from headgate.core.errors import NotFound
from headgate.core.money import NANO_PER_USD, NanoUSD
from headgate.service.accounts import Administration
from headgate.service.keys import digest
from headgate.web.app import HeadgateApp
from headgate.web.routes import route_table
from headgate.web.server import DrainingServer

DEMO_ACCOUNT = "demo"
DEMO_CREDIT = NanoUSD(10 * NANO_PER_USD)
DEMO_KEY_FILE = "demo.key"
DEMO_TOKEN_SECONDS = 24 * 3600
BACKLOG = 4096

log = structlog.get_logger("headgate.serve")


class Demo(Struct, frozen=True, kw_only=True):
    """What a newcomer gets: an API key, and a JWT for the page."""

    key: str
    token: str | None


def serve(settings: Settings, *, host: str, port: int, demo: bool, read: Callable[[], Settings]) -> None:
    """Run until SIGTERM or SIGINT; SIGHUP reloads the catalogue from what `read` reads.

    ConfigError or LedgerUnavailable when it cannot start.
    """
    logs.configure(settings.log)
    uvloop.run(_serve(settings, host, port, demo, read))


async def _serve(settings: Settings, host: str, port: int, demo: bool, read: Callable[[], Settings]) -> None:
    hangups = Hangups()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangups.signalled)
    with _listen(host, port) as listener:
        async with open_gateway(settings) as gateway:
            welcome = await asyncio.to_thread(_demo, settings) if demo else None
            address = ""

            def public_url() -> str:
                return settings.server.public_url.rstrip("/") or address

            def on_ready(url: str) -> None:
                nonlocal address
                address = url
                for engine, status in gateway.engines().items():
                    log.info("engine", model=engine, **status)
                log.info("ready", url=url, config=settings.source, data=str(settings.data_dir))
                _settle_memory()
                lines = [] if welcome is None else _welcome(welcome, public_url())
                print(*lines, f"ready {url}", sep="\n", flush=True)

            app = HeadgateApp(route_table(settings, gateway, public_url), settings.server.cors_origins)
            reloading = Reloading(gateway, settings, read)
            try:
                hangups.lead_to(reloading.begin)
                await DrainingServer(app, gateway, on_ready).serve(sockets=[listener])
            finally:
                await reloading.aclose()


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before anything else starts. ConfigError when it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another with --host and --port"
        ) from error


def _settle_memory() -> None:
    """Tell the collector that what is here now stays, and to look less often: 6 % of a request otherwise."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def _demo(settings: Settings) -> Demo:
    """The demo account with 10 USD and one key, made once; the key is kept in the data folder."""
    with administration(settings) as admin:
        try:
            admin.balance(DEMO_ACCOUNT)
        except NotFound:
            admin.create_account(DEMO_ACCOUNT, DEMO_CREDIT)
        key = _demo_key(admin, settings.data_dir / DEMO_KEY_FILE)
        symmetric = settings.tokens.algorithm == "HS256"
        token = admin.create_token(DEMO_ACCOUNT, DEMO_TOKEN_SECONDS).token if symmetric else None
    return Demo(key=key, token=token)


def _demo_key(admin: Administration, path: Path) -> str:
    """The key in the file, while it is valid; else a new one."""
    try:
        kept = path.read_text(encoding="ascii").strip()
    except (FileNotFoundError, UnicodeDecodeError):
        kept = ""
    records = admin.keys()
    valid = {record.digest for record in records if record.revoked_ms is None}
    if kept and digest(kept) in valid:
        return kept
    key = admin.create_key(DEMO_ACCOUNT).key
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(key + "\n")
    return key


def _welcome(demo: Demo, url: str) -> list[str]:
    body = '{"model": "demo", "prompt": "Once upon a time", "max_tokens": 64}'
    lines = [
        "",
        f"  key   {demo.key}",
        f"  try   curl {url}/v1/completions -H 'Authorization: Bearer {demo.key}' "
        f"-H 'Content-Type: application/json' -d '{body}'",
    ]
    if demo.token is not None:
        lines.append(f"  page  {url}/ui#token={demo.token}")
    return [*lines, ""]
