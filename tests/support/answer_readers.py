"""What the readers of streamed answers make of blocks of bytes, by the format they come in."""

from collections.abc import Sequence

from msgspec import Struct
from tests.support.jobs import job
from tests.support.wires import FormatName

from headgate.core.completion import FinishReason, Message, Usage
from headgate.core.errors import UpstreamError
from headgate.providers import anthropic_stream, cohere_stream, openai_stream
from headgate.providers.sse_reader import SSEReader
from headgate.providers.upstream import EventReader

PROVIDER = "acme"
MESSAGES = (Message(role="user", content="Hi"),)


class Read(Struct, frozen=True):
    """`pieces` of text as they came, the reasons to finish, the usage reported last, and the failure's kind."""

    pieces: tuple[str, ...]
    finishes: tuple[FinishReason, ...]
    usage: Usage | None
    failure: type[UpstreamError] | None


def reader_of(name: FormatName) -> EventReader:
    match name:
        case "completions" | "chat":
            return openai_stream.StreamedAnswer(PROVIDER, 1, None)
        case "anthropic":
            return anthropic_stream.StreamedMessage(PROVIDER, job(messages=MESSAGES), None)
        case "cohere":
            return cohere_stream.StreamedAnswer(PROVIDER)


def read(name: FormatName, blocks: Sequence[bytes]) -> Read:
    """Everything in these blocks, if the connection ends after them."""
    answer, events = reader_of(name), SSEReader()
    chunks = []
    for block in blocks:
        if not answer.ended:
            chunks += answer.take(events.feed(block))
    if not answer.ended:
        chunks += answer.take(events.last())
        answer.connection_ended()
        chunks += answer.reported()
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None and chunk.usage.final]
    return Read(
        pieces=tuple(chunk.text for chunk in chunks if chunk.text),
        finishes=tuple(chunk.finish_reason for chunk in chunks if chunk.finish_reason is not None),
        usage=usages[-1] if usages else None,
        failure=None if answer.failure is None else type(answer.failure),
    )
