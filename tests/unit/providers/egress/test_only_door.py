"""Nothing but the egress package speaks to the network as a client, so keys leave by one door."""

import ast
from collections.abc import Iterator
from pathlib import Path

import headgate

SOURCE = Path(headgate.__file__).parent

CLIENTS = (
    "aiohttp",
    "aiohappyeyeballs",
    "ftplib",
    "http.client",
    "httpcore",
    "httpx",
    "imaplib",
    "poplib",
    "pycurl",
    "requests",
    "smtplib",
    "socket",
    "telnetlib",
    "urllib.request",
    "urllib3",
    "websockets",
    "xmlrpc",
)
CONNECTING = {"create_connection", "open_connection", "create_unix_connection", "open_unix_connection"}
CONNECTING |= {"create_datagram_endpoint", "sock_connect", "import_module", "__import__", "PyJWKClient"}

KNOWN = {
    ("bootstrap/serve.py", "socket"),  # listens
    ("providers/embedded/side.py", "socket"),  # listens, in the child
    ("providers/embedded/client.py", "create_connection"),  # to the child, on loopback
    ("providers/embedded/client.py", "create_unix_connection"),
}


def _used(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield module
                yield from (f"{module}.{name.name}" for name in names)
            case ast.Attribute(attr=name) | ast.Name(id=name) if name in CONNECTING:
                yield name


def _client(name: str) -> str | None:
    if name in CONNECTING:
        return name
    return next((client for client in CLIENTS if name == client or name.startswith(client + ".")), None)


def _found(source: str) -> set[str]:
    return {client for name in _used(ast.parse(source)) if (client := _client(name))}


def test_no_other_module_has_a_client() -> None:
    found = {
        (str(file.relative_to(SOURCE)), client)
        for file in SOURCE.rglob("*.py")
        if not file.is_relative_to(SOURCE / "providers" / "egress")
        for client in _found(file.read_text())
    }
    assert found == KNOWN


def test_the_egress_package_speaks_aiohttp() -> None:
    found = {
        client
        for file in (SOURCE / "providers" / "egress").rglob("*.py")
        for client in _found(file.read_text())
    }
    assert found == {"aiohttp", "socket"}


def test_a_client_is_found_however_it_is_imported() -> None:
    assert _found("import aiohttp.web") == {"aiohttp"}
    assert _found("from urllib import request") == {"urllib.request"}
    assert _found("from http.client import HTTPConnection") == {"http.client"}
    assert _found("def f():\n    import requests as r") == {"requests"}
    assert _found("import asyncio\nasyncio.open_connection('x', 1)") == {"open_connection"}
    assert _found("from urllib.parse import quote\nimport http, socketserver") == set()
