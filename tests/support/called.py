"""Streamed tool calls, put together again."""

from collections.abc import Iterable

from msgspec.structs import replace

from headgate.core.completion import Chunk, ToolCall


def called(chunks: Iterable[Chunk]) -> list[ToolCall]:
    """The tool calls that the pieces in these chunks come to."""
    calls: dict[int, ToolCall] = {}
    for piece in (piece for chunk in chunks for piece in chunk.tool_calls or ()):
        if piece.position in calls:
            assert piece.id is None and piece.name is None
            before = calls[piece.position]
            calls[piece.position] = replace(before, arguments=before.arguments + piece.arguments)
        else:
            assert piece.position == len(calls)
            assert piece.id and piece.name
            calls[piece.position] = ToolCall(id=piece.id, name=piece.name, arguments=piece.arguments)
    return list(calls.values())
