"""Chat's answer as a stream.

https://platform.openai.com/docs/api-reference/chat/streaming
"""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from headgate.core.completion import Chunk, CompletionRequest, ToolCallPiece
from headgate.dialects.chat_wire import CHUNK, CalledPiece, CallPiece, completion_id
from headgate.dialects.openai_form import OpenAIStream
from headgate.dialects.openai_logprobs import chat_logprobs
from headgate.dialects.openai_wire import FINISH_REASONS, choice_tail, finish_tail

_encode = msgspec.json.Encoder().encode


class ChatStream(OpenAIStream):
    """For each choice its role, its content and its tool calls as they come, its finish reason."""

    def __init__(self, request: CompletionRequest, model: str) -> None:
        super().__init__(request, model, completion_id(request), CHUNK)
        close = self._close
        self._heads: dict[int, bytes] = {}
        self._tail = b"}" + choice_tail(None) + close
        self._scored_tail = finish_tail(None) + close
        self._finishes = {reason: b"{}" + choice_tail(reason) + close for reason in FINISH_REASONS}

    def chunks(self, batch: Sequence[Chunk]) -> bytes:
        most = self._request.logprobs
        parts: list[bytes] = []
        for chunk in batch:
            if chunk.index < 0:  # usage only
                continue
            head = self._heads.get(chunk.index)
            if head is None:
                head = self._heads[chunk.index] = self._open + b'{"index":%d,"delta":' % chunk.index
                # As in the blocking form, the content is null where there are calls alone.
                content = b"null" if chunk.tool_calls and not chunk.text else b'""'
                parts += (head, b'{"role":"assistant","content":', content, self._tail)
            scores = chat_logprobs(chunk.logprobs, most) if most is not None and chunk.logprobs else None
            if scores is not None and scores.content:
                logprobs = b'},"logprobs":' + _encode(scores)
                parts += (head, b'{"content":', _encode(chunk.text), logprobs, self._scored_tail)
            elif chunk.text:
                parts += (head, b'{"content":', _encode(chunk.text), self._tail)
            if chunk.tool_calls:
                calls = [_piece(piece) for piece in chunk.tool_calls]
                parts += (head, b'{"tool_calls":', _encode(calls), self._tail)
            if chunk.finish_reason is not None:
                parts += (head, self._finishes[chunk.finish_reason])
        return b"".join(parts)


def _piece(piece: ToolCallPiece) -> CallPiece:
    return CallPiece(
        index=piece.position,
        id=UNSET if piece.id is None else piece.id,
        type=UNSET if piece.id is None else "function",
        function=CalledPiece(name=UNSET if piece.name is None else piece.name, arguments=piece.arguments),
    )
