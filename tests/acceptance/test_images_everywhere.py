"""Images in front of each kind of upstream: what it sees, what is held, and what no model ever gets to see."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from tests.support.catalogue import INPUT, OUTPUT
from tests.support.client import Client
from tests.support.looking import (
    CONFIG,
    GIF,
    IMAGE_TOKENS,
    JPEG,
    MOST_BYTES,
    PART,
    PICTURES,
    PNG,
    PUBLIC_URL,
    WEBP,
    chat,
    data_url,
    dify,
    local,
    looking,
    picture,
    remote,
    saying,
    seen,
    text,
    uploaded,
)
from tests.support.three_kinds import KINDS, Kind, ThreeKinds, model_of, open_three_kinds

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def kinds(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ThreeKinds]:
    async with open_three_kinds(CONFIG, tmp_path_factory.mktemp("images")) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def account(kinds: ThreeKinds) -> Client:
    return await kinds.client()


def sdk_of(kinds: ThreeKinds, account: Client) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{kinds.url}/v1", api_key=account.key, max_retries=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_images_of_a_chat_arrive_byte_for_byte_and_in_their_places(
    kinds: ThreeKinds, account: Client, kind: Kind, stream: bool
) -> None:
    content = [text("First "), picture(data_url(PNG)), text("then "), picture(data_url(GIF, "image/gif"))]
    content += [picture(data_url(JPEG, "image/jpg")), picture(data_url(WEBP, "IMAGE/WEBP")), text("?")]
    kinds.ups[kind].script(saying(kind, "Dots", "."))
    async with sdk_of(kinds, account) as sdk:
        messages: Any = [{"role": "user", "content": content}]
        if stream:
            chunks = await sdk.chat.completions.create(
                model=model_of(kind), messages=messages, max_tokens=16, stream=True
            )
            said = "".join([choice.delta.content or "" async for chunk in chunks for choice in chunk.choices])
        else:
            answer = await sdk.chat.completions.create(model=model_of(kind), messages=messages, max_tokens=16)
            said = answer.choices[0].message.content or ""
    assert said == "Dots."
    assert seen(kinds.latest(kind).json) == [
        ("text", "First "),
        ("image/png", PNG),
        ("text", "then "),
        ("image/gif", GIF),
        ("image/jpeg", JPEG),
        ("image/webp", WEBP),
        ("text", "?"),
    ]
    (row,) = await kinds.books.settled(account.account)
    assert row.source == "provider"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_hold_reckons_with_the_images_and_the_charge_with_the_upstreams_figures(
    kinds: ThreeKinds, account: Client, kind: Kind
) -> None:
    held: list[int] = []
    up = kinds.ups[kind]
    up.hold()
    for number, urls in enumerate([(), (data_url(PNG),), (data_url(PNG), data_url(GIF))], start=1):
        up.script(saying(kind, "Yes.", hold_at=0))
        before = len(up.requests)
        asking = asyncio.ensure_future(chat(account, looking(model_of(kind), *urls)))
        await up.request(before)
        held.append(await kinds.books.held(account.account))
        up.release()
        assert (await asking)[0] == 200
        row = (await kinds.books.settled(account.account, number))[-1]
        up.hold()
    up.release()
    assert [later - held[0] for later in held] == [0, IMAGE_TOKENS * INPUT, 2 * IMAGE_TOKENS * INPUT]
    fresh = row.prompt_tokens - row.cached_tokens
    assert row.price == fresh * INPUT + row.cached_tokens * (INPUT // 2) + row.completion_tokens * OUTPUT
    assert row.source == "provider"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_uploaded_to_dify_arrives_byte_for_byte(
    kinds: ThreeKinds, account: Client, kind: Kind, stream: bool
) -> None:
    app = model_of(kind)
    files = [local(await uploaded(account, app, content)) for content in PICTURES.values()]
    kinds.ups[kind].script(saying(kind, "Dots", "."))
    status, answer = await dify(account, app, *files, stream=stream)
    assert status == 200, answer
    assert sorted(seen(kinds.latest(kind).json)) == sorted([("text", "What is it?"), *PICTURES.items()])
    assert len(await kinds.books.settled(account.account)) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_what_the_bytes_are_counts_and_not_what_was_said(
    kinds: ThreeKinds, account: Client, kind: Kind
) -> None:
    kinds.ups[kind].script(saying(kind, "A dot."))
    urls = (data_url(PNG, "image/jpeg"), data_url(JPEG, "image/webp"), data_url(GIF, "image/png"))
    status, _ = await chat(account, looking(model_of(kind), *urls))
    assert status == 200
    assert seen(kinds.latest(kind).json)[1:] == [
        ("image/png", PNG),
        ("image/jpeg", JPEG),
        ("image/gif", GIF),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_without_eyes_refuses_images_naming_the_part(
    kinds: ThreeKinds, account: Client, kind: Kind, stream: bool
) -> None:
    before, blind = kinds.asked, f"{kind}-blind"
    for url in (data_url(PNG), PUBLIC_URL):
        status, answer = await chat(account, looking(blind, url, stream=stream))
        assert (status, answer["error"]["param"]) == (400, PART)
        assert answer["error"]["code"] == "unsupported_parameter"
    for file in (local(await uploaded(account, blind, PNG)), remote(PUBLIC_URL)):
        status, answer = await dify(account, blind, file, stream=stream)
        assert (status, answer["code"]) == (400, "invalid_param")
        assert "files[0]" in answer["message"]
    assert kinds.asked == before
    assert kinds.untouched(account)


async def test_anthropic_knows_no_low_detail(kinds: ThreeKinds, account: Client) -> None:
    body = looking(model_of("anthropic"))
    body["messages"][0]["content"].append(picture(data_url(PNG), detail="low"))
    before = kinds.asked
    status, answer = await chat(account, body)
    assert (status, answer["error"]["code"]) == (400, "unsupported_parameter")
    assert answer["error"]["param"] == "messages[0].content[1].image_url.url"
    assert "detail must be auto or high" in answer["error"]["message"]
    assert kinds.asked == before


NO_IMAGES = {
    "garbage": data_url(b"\x00\x01garbage"),
    "svg": data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "pdf": data_url(b"%PDF-1.7"),
    "not-base64": "data:image/png;base64,@@@@",
    "unpadded": data_url(PNG).rstrip("="),
    "blank": "data:image/png;base64,",
    "percent": "data:image/png,%89PNG",
    "html": data_url(PNG, "text/html"),
    "svg-type": data_url(PNG, "image/svg+xml"),
    "no-url": "",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("url", NO_IMAGES.values(), ids=NO_IMAGES.keys())
async def test_what_is_no_image_is_refused_before_anything_is_held(
    kinds: ThreeKinds, account: Client, kind: Kind, url: str
) -> None:
    before = kinds.asked
    for stream in (False, True):
        status, answer = await chat(account, looking(model_of(kind), url, stream=stream))
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), answer
        assert answer["error"]["param"] == PART
    assert kinds.asked == before
    assert kinds.untouched(account)


@pytest.mark.parametrize("kind", KINDS)
async def test_too_many_and_too_large_images_are_refused(
    kinds: ThreeKinds, account: Client, kind: Kind
) -> None:
    before, model = kinds.asked, model_of(kind)
    status, answer = await chat(account, looking(model, *[data_url(PNG)] * 21))
    assert (status, answer["error"]["param"]) == (400, "messages")
    assert "20" in answer["error"]["message"]
    too_large = PNG.ljust(MOST_BYTES + 1, b"x")
    status, answer = await chat(account, looking(model, data_url(too_large)))
    assert (status, answer["error"]["param"]) == (400, PART)
    assert str(MOST_BYTES) in answer["error"]["message"]
    status, answer = await chat(account, looking(model, data_url(PNG.ljust(8_000_000, b"x"))))
    assert (status, answer["error"]["type"]) == (413, "invalid_request_error")
    largest = local(await uploaded(account, model, PNG.ljust(MOST_BYTES, b"x")))
    status, answer = await dify(account, model, *[largest] * 4)
    assert (status, answer["code"]) == (400, "invalid_param")
    assert "together" in answer["message"]
    status, answer = await dify(account, model, *[largest] * 11)
    assert (status, answer["code"]) == (400, "invalid_param")
    assert kinds.asked == before
    assert kinds.untouched(account)
    kinds.ups[kind].script(saying(kind, "Large."))
    assert (await chat(account, looking(model, data_url(PNG.ljust(MOST_BYTES, b"x")))))[0] == 200
    assert seen(kinds.latest(kind).json)[1] == ("image/png", PNG.ljust(MOST_BYTES, b"x"))
