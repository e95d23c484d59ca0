"""Chat's answer as a stream.

https://platform.openai.com/docs/api-reference/chat/streaming
"""

from collections.abc import Sequence

import msgspec

from headgate.core.completion import Chunk, CompletionRequest
from headgate.dialects.chat_wire import CHUNK, completion_id
from headgate.dialects.openai_form import OpenAIStream
from headgate.dialects.openai_logprobs import chat_logprobs
from headgate.dialects.openai_wire import FINISH_REASONS, choice_tail, finish_tail

_encode = msgspec.json.Encoder().encode


class ChatStream(OpenAIStream):
    """For each choice its role, its content as it comes, its finish reason."""

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
                parts += (head, b'{"role":"assistant","content":""', self._tail)
            scores = chat_logprobs(chunk.logprobs, most) if most is not None and chunk.logprobs else None
            if scores is not None and scores.content:
                logprobs = b'},"logprobs":' + _encode(scores)
                parts += (head, b'{"content":', _encode(chunk.text), logprobs, self._scored_tail)
            elif chunk.text:
                parts += (head, b'{"content":', _encode(chunk.text), self._tail)
            if chunk.finish_reason is not None:
                parts += (head, self._finishes[chunk.finish_reason])
        return b"".join(parts)
