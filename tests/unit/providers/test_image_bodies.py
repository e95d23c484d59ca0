"""Bodies with images: what is written, how often, and in whose time."""

import asyncio
import gc
import threading
import tracemalloc
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from tests.support.anthropic_upstream import AnthropicUpstream
from tests.support.asking import KEY, nothing
from tests.support.cohere_upstream import CohereUpstream
from tests.support.jobs import job
from tests.support.upstream import Upstream

from headgate.config import ProviderSettings
from headgate.core.completion import Image, Job, Message, Sampling
from headgate.core.errors import InvalidRequest
from headgate.core.ports import Provider
from headgate.providers.anthropic import Anthropic
from headgate.providers.cohere import Cohere
from headgate.providers.image_bodies import (
    AT_ONCE_BYTES,
    PIECE_BYTES,
    ImageBodies,
    InBase64,
    image_bytes,
    written,
)
from headgate.providers.openai_compatible import OpenAICompatible

LARGE = AT_ONCE_BYTES + 1


def seeing(size: int = 3, **fields: Any) -> Job:
    image = Image(data=bytes(index % 251 for index in range(size)), media_type="image/png")
    return job(messages=(Message(role="user", content="See.", parts=("See.", image)),), **fields)


class Writer:
    """Writes bodies, and remembers for which jobs and in which threads."""

    def __init__(self, fails: bool = False) -> None:
        self.jobs: list[Job] = []
        self.threads: list[threading.Thread] = []
        self._fails = fails

    def __call__(self, job: Job, *, stream: bool) -> bytes:
        self.jobs.append(job)
        self.threads.append(threading.current_thread())
        if self._fails:
            raise InvalidRequest("No.", param="messages")
        return f"{len(self.jobs)}, streamed: {stream}".encode()


async def written_for(bodies: ImageBodies, *jobs: Job, size: int = 3, stream: bool = False) -> list[bytes]:
    calls = [bodies.body(one, size, stream=stream) for one in jobs]
    return await asyncio.gather(*(call() for call in calls))


# --- how often --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, LARGE])
async def test_the_calls_of_one_request_share_a_body(size: int) -> None:
    make = Writer()
    asked = seeing()
    places = [replace(asked, first_index=k, counts_prompt=k == 0, prompt_index=k) for k in range(64)]
    found = await written_for(ImageBodies(make), *places, size=size)
    assert len(make.jobs) == 1
    assert all(body is found[0] for body in found)


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": Sampling(seed=7)},
        {"max_tokens": 7},
        {"n": 2},
        {"logprobs": 1},
        {"messages": seeing().messages},
        {"model": seeing().model},
    ],
    ids=str,
)
async def test_calls_that_differ_in_what_is_sent_do_not(change: dict[str, Any]) -> None:
    make = Writer()
    asked = seeing()
    found = await written_for(ImageBodies(make), asked, replace(asked, **change))
    assert len(set(found)) == len(make.jobs) == 2


async def test_a_streamed_and_a_blocking_call_have_bodies_of_their_own() -> None:
    bodies = ImageBodies(Writer())
    asked = seeing()
    blocking, streamed = bodies.body(asked, 3, stream=False), bodies.body(asked, 3, stream=True)
    assert await blocking() != await streamed()


async def test_a_body_is_kept_for_as_long_as_one_of_its_calls_is_there_and_no_longer() -> None:
    make = Writer()
    bodies = ImageBodies(make)
    asked = seeing()
    first = bodies.body(asked, 3, stream=False)
    await first()
    await written_for(bodies, asked)
    assert len(make.jobs) == 1
    del first
    gc.collect()
    await written_for(bodies, asked)
    assert len(make.jobs) == 2


async def test_a_caller_that_leaves_takes_nothing_from_the_others() -> None:
    make = Writer()
    bodies = ImageBodies(make)
    asked = seeing()
    leaving, staying = (bodies.body(asked, LARGE, stream=False) for _ in range(2))
    left = asyncio.ensure_future(leaving())
    stayed = asyncio.ensure_future(staying())
    await asyncio.sleep(0)
    left.cancel()
    assert await stayed == b"1, streamed: False"
    assert left.cancelled()


async def test_what_cannot_be_written_fails_all_who_wait_for_it() -> None:
    bodies = ImageBodies(Writer(fails=True))
    asked = seeing()
    calls = [bodies.body(asked, LARGE, stream=False)() for _ in range(3)]
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(one) for one in found] == [InvalidRequest] * 3


async def test_large_ones_are_written_beside_the_loop_one_at_a_time() -> None:
    make = Writer()
    bodies = ImageBodies(make)
    asked = seeing()
    await written_for(bodies, *(replace(asked, max_tokens=k + 1) for k in range(5)), size=LARGE)
    await written_for(bodies, asked, size=AT_ONCE_BYTES)
    mine = [thread is threading.current_thread() for thread in make.threads]
    assert mine == [False] * 5 + [True]


# --- what -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [0, 1, 2, 3, 4, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES + 2]
)
@pytest.mark.parametrize("head", ["", "data:image/png;base64,", 'a"\\é'])
def test_content_is_written_as_base64_after_its_head(size: int, head: str) -> None:
    content = bytes(index % 251 for index in range(size))
    text = msgspec.json.decode(msgspec.json.encode([InBase64(content, head)], enc_hook=written))
    assert text == [head + b64encode(content).decode()]


def test_what_is_no_image_is_not_written() -> None:
    with pytest.raises(NotImplementedError):
        msgspec.json.encode(object(), enc_hook=written)


def test_images_that_are_elsewhere_have_no_size() -> None:
    parts = (Image(url="https://example.org/a.png"), Image(data=b"12"), "x", Image(data=b"345"))
    assert image_bytes(job(messages=(Message(role="user", content="x", parts=parts),))) == 5
    assert image_bytes(job(messages=(Message(role="user", content="x", parts=parts[:1]),))) == 0
    assert image_bytes(job(messages=(Message(role="user", content="x"),))) is None
    assert image_bytes(job()) is None


# --- on its way -------------------------------------------------------------------------------------------------

Asking = Callable[[dict[str, Any]], str]


def url_of(body: dict[str, Any]) -> str:
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    assert isinstance(url, str)
    return url


def source_of(body: dict[str, Any]) -> str:
    source = body["messages"][0]["content"][1]["source"]
    return f"data:{source['media_type']};{source['type']},{source['data']}"


KINDS: list[Any] = [
    pytest.param(Upstream, OpenAICompatible, "openai", url_of, id="openai"),
    pytest.param(AnthropicUpstream, Anthropic, "anthropic", source_of, id="anthropic"),
    pytest.param(CohereUpstream, Cohere, "cohere", url_of, id="cohere"),
]


def connected(kind: Callable[..., Provider], named: Any, url: str) -> Provider:
    return kind("acme", ProviderSettings(kind=named, base_url=url, api_key_env="ACME_KEY"), KEY)


@pytest.mark.parametrize(("served", "kind", "named", "image_in"), KINDS)
async def test_a_large_image_arrives_whole_both_ways(
    served: type[Upstream], kind: Callable[..., Provider], named: str, image_in: Asking
) -> None:
    asked = seeing(LARGE)
    assert asked.messages is not None
    image = asked.messages[0].parts[1]
    assert isinstance(image, Image) and image.data is not None
    async with served() as upstream:
        provider = connected(kind, named, upstream.url)
        await asyncio.gather(*(provider.complete(asked, nothing) for _ in range(3)))
        assert [chunk async for batch in provider.stream(asked, nothing) for chunk in batch]
        await provider.aclose()
        bodies = [request.json for request in upstream.requests]
    assert [bool(body.get("stream")) for body in bodies] == [False] * 3 + [True]
    expected = "data:image/png;base64," + b64encode(image.data).decode()
    assert all(image_in(body) == expected for body in bodies)


@pytest.mark.parametrize(("served", "kind", "named", "image_in"), KINDS)
async def test_looking_at_a_conversation_writes_nothing(
    served: type[Upstream], kind: Callable[..., Provider], named: str, image_in: Asking
) -> None:
    asked = seeing(4 * LARGE)
    provider = connected(kind, named, "http://127.0.0.1:1/v1")
    tracemalloc.start()
    try:
        assert await provider.count_prompt(asked) is None
        assert tracemalloc.get_traced_memory()[1] < LARGE
    finally:
        tracemalloc.stop()
    await provider.aclose()
