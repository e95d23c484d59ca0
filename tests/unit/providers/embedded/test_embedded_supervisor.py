"""Engine processes: started, watched, restarted, and never left behind."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from pathlib import Path

import msgspec
import psutil
import pytest
import structlog

from headgate.config import demo_model_path
from headgate.core.errors import Overloaded
from headgate.providers.embedded import client
from headgate.providers.embedded.supervisor import Restarts, Supervisor

QUICK = Restarts(first_s=0.01, longest_s=0.05)
IMPATIENT = Restarts(first_s=0.01, longest_s=0.05, ask_s=0.05, silence_s=0.5)
Supervise = Callable[..., Supervisor]


def entries(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def until(condition: Callable[[], object], deadline_s: float = 20) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110  # processes have no event to wait for
            await asyncio.sleep(0.01)


@pytest.fixture
async def supervise() -> AsyncIterator[Supervise]:
    """`supervise(file, …)`: a started supervisor, closed at the end."""
    async with AsyncExitStack() as stack:

        def start(
            file: Path | str | None = None, *, restarts: Restarts = QUICK, folder: Path | None = None
        ) -> Supervisor:
            path = str(file or demo_model_path())
            supervisor = Supervisor(
                path, name="demo, mine", slots=1, threads=1, context=512, restarts=restarts, folder=folder
            )
            stack.push_async_callback(supervisor.aclose)
            supervisor.start()
            return supervisor

        yield start


async def tokens_of(supervisor: Supervisor) -> bytes:
    return await client.post(supervisor.address(), "/tokenize", b'{"content": "hello"}', 4096)


async def test_an_engine_comes_up_small_in_a_private_folder_and_goes_without_a_trace(
    supervise: Supervise, tmp_path: Path
) -> None:
    supervisor = supervise(folder=tmp_path)
    assert supervisor.status().state == "starting"
    with pytest.raises(Overloaded):
        supervisor.address()
    status = await supervisor.ready_or_failed(30)
    assert (status.state, status.model, status.reason) == ("up", "demo, mine", None)
    assert status.pid is not None
    socket = Path(supervisor.address().path)
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    assert b"tokens" in await tokens_of(supervisor)
    assert psutil.Process(status.pid).memory_info().rss < 80 * 1024 * 1024
    await supervisor.aclose()
    assert not psutil.pid_exists(status.pid)
    assert entries(tmp_path) == []
    with pytest.raises(Overloaded):
        supervisor.address()


async def test_a_killed_engine_is_restarted_and_the_reason_kept(supervise: Supervise, tmp_path: Path) -> None:
    supervisor = supervise(folder=tmp_path)
    first = await supervisor.ready_or_failed(30)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    await until(lambda: supervisor.status().state == "up" and supervisor.status().pid != first.pid)
    assert supervisor.status().reason == "killed by SIGKILL"
    assert b"tokens" in await tokens_of(supervisor)
    assert len(entries(tmp_path)) == 1


async def test_a_stopped_engine_is_replaced_without_anyone_asking(
    supervise: Supervise, tmp_path: Path
) -> None:
    supervisor = supervise(restarts=IMPATIENT, folder=tmp_path)
    first = await supervisor.ready_or_failed(30)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)
    await until(lambda: supervisor.status().state == "up" and supervisor.status().pid != first.pid)
    assert supervisor.status().reason == "silent for 0.5 seconds"
    assert not psutil.pid_exists(first.pid)
    assert b"tokens" in await tokens_of(supervisor)
    assert len(entries(tmp_path)) == 1


@pytest.mark.parametrize("socket", ["engine.sock", "side.sock"])
async def test_an_engine_with_a_socket_that_is_gone_is_replaced(
    supervise: Supervise, tmp_path: Path, socket: str
) -> None:
    supervisor = supervise(restarts=IMPATIENT, folder=tmp_path)
    first = await supervisor.ready_or_failed(30)
    for folder in entries(tmp_path):
        (folder / socket).unlink()
    await until(lambda: supervisor.status().state == "up" and supervisor.status().pid != first.pid)
    assert supervisor.status().reason == "silent for 0.5 seconds"
    assert b"tokens" in await tokens_of(supervisor)


async def test_an_engine_that_is_only_busy_is_left_alone(supervise: Supervise) -> None:
    supervisor = supervise(restarts=Restarts(ask_s=0.05, silence_s=2))
    first = await supervisor.ready_or_failed(30)
    body = {"prompt": "Once", "n_predict": 480, "temperature": 2.0, "ignore_eos": True, "stream": True}
    silences: list[float] = []

    async def generate() -> None:
        began = time.monotonic()
        events = client.post_events(
            supervisor.address(), "/completion", msgspec.json.encode(body), lambda: None
        )
        async with aclosing(events):
            await anext(events)
            silences.append(time.monotonic() - began)
            async for _ in events:
                pass

    # With one slot each waits for those before it, and hears nothing meanwhile.
    while not silences or max(silences) < 2.5:
        await asyncio.gather(*(generate() for _ in range(16)))
    assert supervisor.status() == first


async def test_an_engine_that_is_only_busy_with_scores_is_left_alone(supervise: Supervise) -> None:
    supervisor = supervise(restarts=Restarts(ask_s=0.05, silence_s=2))
    first = await supervisor.ready_or_failed(30)
    body = msgspec.json.encode({"ids": [7, 8, 9, 10] * 128, "from": 0, "top": 0})
    silences: list[float] = []

    async def score() -> None:
        began = time.monotonic()
        await client.post(supervisor.side_address(), "/score", body, 1 << 20)
        silences.append(time.monotonic() - began)

    # They are computed one after the other.
    while not silences or max(silences) < 2.5:
        await asyncio.gather(*(score() for _ in range(40)))
    assert supervisor.status() == first


async def test_a_file_that_cannot_be_loaded_fails_with_its_reason_but_without_its_path(
    supervise: Supervise, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(demo_model_path().read_bytes()[:500_000])
    supervisor = supervise(cut)
    status = await supervisor.ready_or_failed(30)
    assert status.state == "failed"
    assert status.reason is not None
    assert status.reason.startswith("exit 1: ")
    assert "corrupted or incomplete" in status.reason
    assert str(tmp_path) not in status.reason
    with pytest.raises(Overloaded):
        supervisor.address()


async def test_a_failed_engine_is_tried_again_and_recovers(supervise: Supervise, tmp_path: Path) -> None:
    late = tmp_path / "late.gguf"
    supervisor = supervise(late)
    assert (await supervisor.ready_or_failed(30)).state == "failed"
    late.write_bytes(demo_model_path().read_bytes())
    await until(lambda: supervisor.status().state == "up")
    assert b"tokens" in await tokens_of(supervisor)


async def test_a_start_that_takes_too_long_is_given_up(supervise: Supervise) -> None:
    supervisor = supervise(restarts=Restarts(first_s=0.01, ready_s=0.001, attempts=1))
    status = await supervisor.ready_or_failed(30)
    assert status.state == "failed"
    assert "not ready within" in (status.reason or "")


async def test_closing_an_engine_that_is_still_starting_leaves_nothing(
    supervise: Supervise, tmp_path: Path
) -> None:
    supervisor = supervise(folder=tmp_path)
    await until(lambda: entries(tmp_path))
    await supervisor.aclose()
    assert entries(tmp_path) == []
    assert not [
        child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE
    ]


async def test_a_folder_that_cannot_be_made_is_a_reason(supervise: Supervise, tmp_path: Path) -> None:
    status = await supervise(folder=tmp_path / "missing").ready_or_failed(30)
    assert status.state == "failed"
    assert "cannot be started" in (status.reason or "")


async def test_whatever_a_start_raises_is_logged_and_counts_as_a_failed_start(supervise: Supervise) -> None:
    with structlog.testing.capture_logs() as logs:
        status = await supervise("no\0file", restarts=Restarts(first_s=0.01, attempts=2)).ready_or_failed(30)
    assert status.state == "failed"
    assert "cannot be started" in (status.reason or "")
    assert [entry["event"] for entry in logs] == ["engine start failed", "engine stopped"] * 2
    assert logs[0]["exc_info"]


async def test_waiting_for_an_engine_ends_at_the_time_limit(supervise: Supervise) -> None:
    status = await supervise().ready_or_failed(0)
    assert status.state == "starting"


async def test_an_engine_that_does_not_listen_is_killed_at_the_end(supervise: Supervise) -> None:
    supervisor = supervise(restarts=Restarts(grace_s=0.1))
    status = await supervisor.ready_or_failed(30)
    assert status.pid is not None
    os.kill(status.pid, signal.SIGSTOP)
    async with asyncio.timeout(10):
        await supervisor.aclose()
    assert not psutil.pid_exists(status.pid)


async def test_a_folder_too_deep_for_a_socket_means_loopback_with_a_key(
    supervise: Supervise, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    supervisor = supervise(folder=deep)
    await supervisor.ready_or_failed(30)
    address = supervisor.address()
    assert address.path == "" and address.port > 0 and len(address.key) == 64
    assert b"tokens" in await tokens_of(supervisor)
    stranger = client.Address(port=address.port, key="guess")
    with pytest.raises(client.EngineRefusal) as caught:
        await client.post(stranger, "/tokenize", b'{"content": "hello"}', 4096)
    assert caught.value.status == 401
    pid = supervisor.status().pid
    assert address.key not in " ".join(psutil.Process(pid).cmdline())
    assert address.key not in " ".join(psutil.Process(pid).environ().values())


async def test_the_engine_inherits_no_secrets_and_no_models_from_the_environment(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    monkeypatch.setenv("LLAMA_ARG_MODEL", "/elsewhere.gguf")
    supervisor = supervise()
    status = await supervisor.ready_or_failed(30)
    environment = psutil.Process(status.pid).environ()
    assert "OPENAI_API_KEY" not in environment
    assert "LLAMA_ARG_MODEL" not in environment


async def test_the_engine_is_not_part_of_the_terminals_session(supervise: Supervise) -> None:
    status = await supervise().ready_or_failed(30)
    assert status.pid is not None
    assert os.getsid(status.pid) != os.getsid(0)


@pytest.mark.process
@pytest.mark.parametrize(
    "stopped",
    [False, pytest.param(True, marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux only"))],
)
async def test_an_engine_dies_with_its_parent_even_after_kill_9(tmp_path: Path, stopped: bool) -> None:
    program = textwrap.dedent(
        f"""
        import asyncio, pathlib
        from headgate.providers.embedded.supervisor import Supervisor

        async def main():
            folder = pathlib.Path({str(tmp_path)!r})
            file = {str(demo_model_path())!r}
            supervisor = Supervisor(file, name="demo", slots=1, threads=1, context=512, folder=folder)
            supervisor.start()
            print("engine", (await supervisor.ready_or_failed(30)).pid, flush=True)
            await asyncio.sleep(600)

        asyncio.run(main())
        """
    )
    parent = subprocess.Popen(  # noqa: ASYNC220  # the loop has nothing else to do
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    )
    try:
        assert parent.stdout is not None
        pid = 0
        for line in parent.stdout:
            if line.startswith("engine "):
                pid = int(line.split()[1])
                break
        engine = psutil.Process(pid)
        if stopped:
            engine.suspend()
        parent.kill()
        try:
            engine.wait(timeout=10)
        finally:
            with suppress(psutil.NoSuchProcess):
                engine.kill()
        await until(lambda: not entries(tmp_path))
    finally:
        parent.kill()
        parent.wait()
        assert parent.stdout is not None
        parent.stdout.close()
