"""A streamed answer, event by event."""

import pytest
from msgspec.structs import replace

from headgate.core.completion import Chunk, Usage
from headgate.core.errors import UpstreamFailed, UpstreamRateLimited
from headgate.providers.openai_stream import StreamedAnswer

TEXT = b'{"choices":[{"index":0,"text":"a","finish_reason":null}]}'
FINISH = b'{"choices":[{"index":0,"text":"","finish_reason":"stop"}]}'
USAGE = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}'


def usage(prompt: int, completion: int) -> Usage:
    return Usage(prompt_tokens=prompt, completion_tokens=completion)


def test_roles_and_empty_pieces_are_no_chunks() -> None:
    answer = StreamedAnswer("acme", 1, None)
    role = b'{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}'
    null = b'{"choices":[{"index":0,"delta":{"content":null},"finish_reason":null}]}'
    assert answer.take([role, null, b'{"choices":[]}', b'{"choices":null}']) == []
    assert not answer.ended


def test_text_and_finish_reason_may_come_in_one_event() -> None:
    answer = StreamedAnswer("acme", 1, None)
    event = b'{"choices":[{"index":0,"delta":{"content":"all"},"finish_reason":"length"}],"usage":null}'
    assert answer.take([event]) == [Chunk(0, "all", "length")]
    assert answer.whole


def test_usage_riding_on_text_is_given_as_it_comes_and_the_last_one_wins() -> None:
    answer = StreamedAnswer("acme", 1, None)
    riding = b'{"choices":[{"index":0,"text":"a"}],"usage":{"prompt_tokens":3,"completion_tokens":%d}}'
    assert answer.take([riding % 1, riding % 2]) == [
        Chunk(0, "a"),
        Chunk(0, "a"),
        Chunk(-1, usage=usage(3, 2)),
    ]
    assert answer.take([]) == []
    assert answer.take([FINISH, riding % 3, b"[DONE]"])[-1] == Chunk(-1, usage=usage(3, 3))
    assert answer.ended


def test_usage_that_leaves_later_text_out_is_not_final() -> None:
    answer = StreamedAnswer("acme", 1, None)
    riding = b'{"choices":[{"index":0,"text":"a"}],"usage":{"prompt_tokens":3,"completion_tokens":1}}'
    assert answer.take([riding, TEXT])[-1] == Chunk(-1, usage=replace(usage(3, 1), final=False))
    assert answer.take([TEXT]) == [Chunk(0, "a")]
    assert answer.take([riding])[-1] == Chunk(-1, usage=usage(3, 1))
    assert answer.take([TEXT])[-1] == Chunk(-1, usage=replace(usage(3, 1), final=False))


def test_usage_after_the_last_finish_reason_is_given_at_once() -> None:
    answer = StreamedAnswer("acme", 1, None)
    assert answer.take([TEXT, FINISH]) == [Chunk(0, "a"), Chunk(0, "", "stop")]
    assert answer.take([USAGE]) == [Chunk(-1, usage=usage(3, 1))]
    assert answer.take([b"[DONE]"]) == []


def test_choices_interleave_and_each_is_waited_for() -> None:
    answer = StreamedAnswer("acme", 2, None)
    other = b'{"choices":[{"index":1,"text":"b","finish_reason":"length"}]}'
    assert answer.take([TEXT, other, USAGE]) == [
        Chunk(0, "a"),
        Chunk(1, "b", "length"),
        Chunk(-1, usage=usage(3, 1)),
    ]
    answer.connection_ended()
    assert isinstance(answer.failure, UpstreamFailed)


def test_done_finishes_choices_that_never_got_a_reason() -> None:
    answer = StreamedAnswer("acme", 1, None)
    assert answer.take([TEXT, b"[DONE]", TEXT]) == [Chunk(0, "a"), Chunk(0, "", "stop")]
    assert answer.ended
    answer.connection_ended()
    assert answer.failure is None


@pytest.mark.parametrize(
    "event",
    [
        b"[DONE]",
        b"{",
        b"not json",
        b'{"choices":[{"index":1,"text":"x"}]}',
        b'{"choices":[{"index":-1,"text":"x"}]}',
        b'{"choices":[{"index":0,"text":7}]}',
        b'{"choices":[{"index":0,"text":"\xff"}]}',
        b'{"x":' + b"[" * 100_000,
    ],
)
def test_what_cannot_be_believed_fails_the_answer(event: bytes) -> None:
    answer = StreamedAnswer("acme", 1, None)
    assert answer.take([event]) == []
    assert answer.ended
    assert isinstance(answer.failure, UpstreamFailed)


def test_chunks_and_usage_before_a_failure_are_kept() -> None:
    answer = StreamedAnswer("acme", 1, None)
    assert answer.take([TEXT, USAGE, b'{"error":{"code":429}}', TEXT]) == [
        Chunk(0, "a"),
        Chunk(-1, usage=usage(3, 1)),
    ]
    assert isinstance(answer.failure, UpstreamRateLimited)


def test_a_refusal_is_text_and_not_a_proper_end() -> None:
    answer = StreamedAnswer("acme", 2, None)
    said = [
        b'{"choices":[{"index":0,"delta":{"content":null,"refusal":"%s"}}]}' % words
        for words in (b"I ", b"cannot.")
    ]
    assert answer.take(said) == [Chunk(0, "I "), Chunk(0, "cannot.")]
    assert answer.take([FINISH, FINISH.replace(b":0", b":1")]) == [
        Chunk(0, "", "content_filter"),
        Chunk(1, "", "stop"),
    ]


def test_a_refusal_that_ends_without_a_reason_says_so_with_tools_too() -> None:
    answer = StreamedAnswer("acme", 1, None, has_tools=True)
    said = b'{"choices":[{"index":0,"delta":{"refusal":"No."}}]}'
    assert answer.take([said, b"[DONE]"]) == [Chunk(0, "No."), Chunk(0, "", "content_filter")]


@pytest.mark.parametrize("nothing", [b'"refusal":null', b'"refusal":""'])
def test_no_refusal_is_none(nothing: bytes) -> None:
    answer = StreamedAnswer("acme", 1, None)
    said = b'{"choices":[{"index":0,"delta":{"content":"a",%s}}]}' % nothing
    end = b'{"choices":[{"index":0,"delta":{%s},"finish_reason":"stop"}]}' % nothing
    assert answer.take([said, end]) == [Chunk(0, "a"), Chunk(0, "", "stop")]
