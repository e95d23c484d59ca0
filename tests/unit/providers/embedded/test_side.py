"""The engine's side door: its HTTP, its key, and clients that leave."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tests.support.engines import ask, engine, refusal
from tests.support.until import until

from headgate.config import demo_model_path
from headgate.providers.embedded import client
from headgate.providers.embedded.supervisor import Supervisor

SCORE = {"ids": [0, 45, 78], "from": 0, "top": 1}


def contents(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def exchange(supervisor: Supervisor, request: bytes) -> bytes:
    """All that comes back for these bytes."""
    reader, writer = await asyncio.open_unix_connection(supervisor.side_address().path)
    writer.write(request)
    try:
        return await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()


async def test_a_client_that_leaves_stops_its_score_and_those_that_wait() -> None:
    async with engine(context=8192) as supervisor:
        process = psutil.Process(supervisor.status().pid)
        await ask(supervisor, "/score", SCORE)
        spent = process.cpu_times().user
        long = {"ids": [7, 8, 9, 10] * 2048, "from": 0, "top": 0}
        # Each takes seconds, and they are done one after the other: a minute or more in all.
        clients = [asyncio.create_task(ask(supervisor, "/score", long)) for _ in range(24)]
        await until(lambda: process.cpu_times().user > spent + 0.5)
        for task in clients:
            task.cancel()
        assert await asyncio.gather(*clients, return_exceptions=True)
        async with asyncio.timeout(20):
            assert (await ask(supervisor, "/score", SCORE))["logprobs"]


async def test_short_questions_do_not_wait_for_scores() -> None:
    async with engine(context=8192) as supervisor:
        process = psutil.Process(supervisor.status().pid)
        await ask(supervisor, "/score", SCORE)
        spent = process.cpu_times().user
        body = {"ids": [7, 8, 9, 10] * 2048, "from": 0, "top": 0}
        score = asyncio.create_task(ask(supervisor, "/score", body))
        await until(lambda: process.cpu_times().user > spent + 0.3)
        assert (await ask(supervisor, "/pieces", {"ids": [0]}))["pieces"] == ["<|endoftext|>"]
        assert not score.done()
        score.cancel()
        await asyncio.gather(score, return_exceptions=True)


async def test_many_scores_at_once_are_all_answered_alike() -> None:
    async with engine() as supervisor:
        alone = await ask(supervisor, "/score", SCORE)
        together = await asyncio.gather(*(ask(supervisor, "/score", SCORE) for _ in range(150)))
    assert all(answer == alone for answer in together)


@pytest.mark.parametrize(
    ("request_line", "fields", "status"),
    [
        ("GET /vocabulary HTTP/1.1", "", 405),
        ("POST /props HTTP/1.1", "Content-Length: 2", 404),
        ("POST /vocabulary HTTP/1.1", "", 400),
        ("POST /vocabulary HTTP/1.1", "Content-Length: two", 400),
        ("POST /vocabulary HTTP/1.1", f"Content-Length: {2**30}", 413),
        ("POST /vocabulary HTTP/1.1", f"Content-Length: {'9' * 5000}", 413),
        ("POST /vocabulary HTTP/1.1", f"Filler: {'x' * 100_000}", 400),
        ("", "", 404),
    ],
)
async def test_what_is_no_proper_request_gets_its_status(request_line: str, fields: str, status: int) -> None:
    async with engine() as supervisor:
        said = await exchange(supervisor, f"{request_line}\r\n{fields}\r\n\r\n{{}}".encode())
        head, _, body = said.partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.1 {status} ".encode())
        assert json.loads(body)["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff", b"[" * 100_000])
async def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    async with engine() as supervisor:
        with pytest.raises(client.EngineRefusal) as caught:
            await client.post(supervisor.side_address(), "/score", body, 4096)
        assert caught.value.status == 400


async def test_on_loopback_the_side_door_wants_the_key(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    async with engine(folder=deep) as supervisor:
        side = supervisor.side_address()
        assert side.path == "" and side.port not in (0, supervisor.address().port)
        assert (await ask(supervisor, "/score", SCORE))["logprobs"]
        for key in ("", "guess"):
            with pytest.raises(client.EngineRefusal) as caught:
                await client.post(client.Address(port=side.port, key=key), "/vocabulary", b"{}", 4096)
            assert caught.value.status == 401
    assert contents(deep) == []


async def test_the_engines_folder_is_private_and_goes_with_all_that_was_in_it(tmp_path: Path) -> None:
    async with engine(folder=tmp_path) as supervisor:
        (folder,) = contents(tmp_path)
        assert supervisor.side_address().path == str(folder / "side.sock")
        assert {path.name for path in contents(folder)} == {"engine.sock", "side.sock", "float32.gguf"}
        assert (folder / "float32.gguf").stat().st_mode & 0o777 == 0o600
    assert contents(tmp_path) == []


def test_the_ready_line_names_both_doors(tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    sockets = ("--socket", str(folder / "engine.sock"), "--side", str(folder / "side.sock"))
    size = ("--slots", "1", "--threads", "1", "--context", "512", "--precision", "auto")
    command = (sys.executable, "-m", "headgate.providers.embedded.engine", str(demo_model_path()))
    process = subprocess.Popen(
        [*command, "--folder", str(folder), *sockets, *size],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        line = json.loads(process.stdout.readline())
        assert line["ready"].endswith(str(folder / "engine.sock"))
        assert line["side"] == str(folder / "side.sock")
        assert line["pid"] == process.pid
        process.stdin.close()
        assert process.wait(timeout=20) == 0
    assert not folder.exists()


async def test_an_engine_without_the_c_interface_serves_and_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ctypes.py").write_text("raise ImportError('not built')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    async with engine() as supervisor:
        status, reason = await refusal(supervisor, "/score", SCORE)
        assert (status, reason) == (501, "this Python is built without ctypes")
        said = await client.post(supervisor.address(), "/tokenize", b'{"content": "hello"}', 4096)
        assert b"tokens" in said
