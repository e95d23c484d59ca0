"""Structured logs on stderr: JSON lines, or coloured text on a terminal. Never prompts, outputs or credentials."""

import logging
import sys
from typing import Any

import msgspec
import structlog
from structlog.typing import Processor

from headgate.config import LogSettings


def configure(settings: LogSettings) -> None:
    """Set up structlog and the standard library's logging (for what our parts log) once, at the start."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    text = settings.format == "text" or (settings.format == "auto" and sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[Processor]
    if text:
        # Plain tracebacks: the pretty ones print local variables, prompts and keys among them.
        render = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    else:
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_json)]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # warns of each malformed form


def _json(event: object, **_: Any) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()
