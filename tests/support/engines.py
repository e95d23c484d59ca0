"""Real engine processes, and questions to their side doors."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from headgate.config import demo_model_path
from headgate.config.settings import Precision
from headgate.providers.embedded import client
from headgate.providers.embedded.supervisor import Restarts, Supervisor

MOST = 64 * 1024 * 1024


@asynccontextmanager
async def engine(
    model: Path | None = None,
    *,
    precision: Precision = "auto",
    context: int = 512,
    folder: Path | None = None,
) -> AsyncIterator[Supervisor]:
    """A supervised engine with one slot that is up, and ended afterwards."""
    supervisor = Supervisor(
        str(model or demo_model_path()),
        name="engine under test",
        slots=1,
        threads=1,
        context=context,
        precision=precision,
        restarts=Restarts(attempts=1),
        folder=folder,
    )
    supervisor.start()
    try:
        status = await supervisor.ready_or_failed(30)
        assert status.state == "up", status.reason
        yield supervisor
    finally:
        await supervisor.aclose()


async def ask(supervisor: Supervisor, path: str, body: object) -> Any:
    """What the side door answers. EngineRefusal where that is not a 200."""
    said = await client.post(supervisor.side_address(), path, msgspec.json.encode(body), MOST)
    return msgspec.json.decode(said)


async def refusal(supervisor: Supervisor, path: str, body: object) -> tuple[int, str]:
    """The status and the reason with which the side door refuses."""
    try:
        said = await ask(supervisor, path, body)
    except client.EngineRefusal as error:
        return error.status, msgspec.json.decode(error.body)["error"]
    raise AssertionError(f"it was answered: {said}")


async def tokens(supervisor: Supervisor, text: str) -> list[int]:
    """The text's token ids, as the engine's own server finds them: special tokens are plain text."""
    body = {"content": text, "add_special": False, "parse_special": False}
    said = await client.post(supervisor.address(), "/tokenize", msgspec.json.encode(body), MOST)
    return list(msgspec.json.decode(said)["tokens"])
