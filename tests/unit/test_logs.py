"""What the logs hold, and what they never hold."""

import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser

from headgate import logs
from headgate.config import LogSettings

SECRET = "canary-9e0f"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    logging.basicConfig(handlers=handlers, level=level, force=True)


def fail(prompt: str) -> None:
    raise ValueError(f"broken after {len(prompt)} characters")


def log_failures() -> None:
    try:
        fail(SECRET)
    except ValueError:
        structlog.get_logger("ours").exception("ours failed", request_id="r1")
        logging.getLogger("theirs").exception("theirs failed")


def test_json_is_one_object_a_line_with_time_and_level(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings(format="json"))
    structlog.get_logger("ours").info("request", request_id="r1", status=200, path=("a", 1), odd=object)
    logging.getLogger("theirs").warning("careful %s", "now")
    out, err = capsys.readouterr()
    ours, theirs = (json.loads(line) for line in err.splitlines())
    assert out == ""  # stdout is for the ready line
    assert (ours["event"], ours["level"], ours["request_id"], ours["status"]) == (
        "request",
        "info",
        "r1",
        200,
    )
    assert ours["timestamp"].endswith("Z")
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("careful now", "warning", "theirs")


@pytest.mark.parametrize("format", ["json", "text"])
def test_a_traceback_never_shows_local_variables(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings(format=format))  # type: ignore[arg-type]
    log_failures()
    err = capsys.readouterr().err
    assert err.count("broken after 11 characters") >= 2
    assert SECRET not in err


@pytest.mark.parametrize(("level", "seen"), [("debug", 3), ("info", 2), ("warning", 1), ("error", 0)])
def test_what_is_below_the_level_is_left_out(
    level: str, seen: int, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.configure(LogSettings(level=level, format="json"))  # type: ignore[arg-type]
    log = structlog.get_logger("ours")
    log.debug("a")
    log.info("b")
    log.warning("c")
    assert len(capsys.readouterr().err.splitlines()) == seen


def test_the_libraries_say_only_what_matters(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the level: what a library logs in passing may hold requests."""
    logs.configure(LogSettings(level="debug", format="json"))
    logging.getLogger("asyncio").info("using a selector")
    logging.getLogger("aiohttp").debug("headers %s", SECRET)
    assert capsys.readouterr().err == ""


def test_a_form_that_a_client_got_wrong_is_no_warning(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(LogSettings(format="json"))
    parser = MultipartParser(b"boundary")
    with pytest.raises(MultipartParseError):
        parser.write(b"--another\r\n")
    parser.finalize()
    assert capsys.readouterr().err == ""
