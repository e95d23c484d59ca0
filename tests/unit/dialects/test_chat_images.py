"""dialects/chat_images.py and chat_messages.py: images in messages."""

import base64
import json

import pytest
from tests.support.rendering import context

from headgate.core import errors
from headgate.core.completion import CompletionRequest, Image, Message
from headgate.core.media import MAX_IMAGES
from headgate.dialects.base import Caps, Dialect
from headgate.dialects.chat import OpenAIChat
from headgate.dialects.chat_wire import ChatBody

DIALECT: Dialect[ChatBody] = OpenAIChat(Caps())
PIXELS = b"\x89PNG\r\n\x1a\n\x00\xff"
URL = "https://example.org/cat.png?size=1"
WHERE = "messages[0].content[0].image_url"


def text(words: object) -> dict[str, object]:
    return {"type": "text", "text": words}


def image(url: object, **fields: object) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def data_url(media_type: str = "image/png", data: bytes = PIXELS) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def parse(*parts: object, role: str = "user") -> CompletionRequest:
    message: dict[str, object] = {"role": role, "content": list(parts)}
    return parse_messages([message])


def parse_messages(messages: list[dict[str, object]]) -> CompletionRequest:
    body = json.dumps({"model": "demo", "messages": messages}).encode()
    return DIALECT.parse(DIALECT.decode(body), context())


def refused(*parts: object, role: str = "user") -> errors.InvalidRequest:
    with pytest.raises(errors.InvalidRequest) as caught:
        parse(*parts, role=role)
    return caught.value


def test_text_and_images_arrive_in_their_order() -> None:
    request = parse_messages(
        [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    text("What is "),
                    image(data_url(), detail="low"),
                    text("this?"),
                    image(URL, detail=None),
                ],
            },
        ]
    )
    assert request.looks
    assert request.messages == (
        Message(role="system", content="Be brief."),
        Message(
            role="user",
            content="What is this?",
            parts=(
                "What is ",
                Image(
                    data=PIXELS,
                    media_type="image/png",
                    detail="low",
                    param="messages[1].content[1].image_url.url",
                ),
                "this?",
                Image(url=URL, param="messages[1].content[3].image_url.url"),
            ),
        ),
    )


def test_text_alone_is_no_look() -> None:
    request = parse(text("a"), text("b"))
    assert not request.looks
    assert request.messages == (Message(role="user", content="ab"),)


def test_an_image_needs_no_text() -> None:
    (message,) = parse(image(URL)).messages or ()
    assert (message.content, message.parts) == ("", (Image(url=URL, param=f"{WHERE}.url"),))


@pytest.mark.parametrize("name", ["png", "jpeg", "gif", "webp"])
def test_the_four_media_types_are_taken(name: str) -> None:
    (message,) = parse(image(data_url(f"image/{name}"))).messages or ()
    assert message.parts == (Image(data=PIXELS, media_type=f"image/{name}", param=f"{WHERE}.url"),)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("image/jpg", "image/jpeg"), ("IMAGE/JPEG", "image/jpeg"), ("Image/Png", "image/png")],
)
def test_a_media_type_has_one_name_however_it_is_written(written: str, meant: str) -> None:
    (message,) = parse(image(data_url(written).replace("data:", "DATA:"))).messages or ()
    assert message.parts == (Image(data=PIXELS, media_type=meant, param=f"{WHERE}.url"),)


@pytest.mark.parametrize("detail", ["auto", "low", "high"])
def test_the_detail_is_kept(detail: str) -> None:
    (message,) = parse(image(URL, detail=detail)).messages or ()
    (part,) = message.parts
    assert isinstance(part, Image)
    assert part.detail == detail


@pytest.mark.parametrize("url", ["http://example.org/a", "HTTPS://EXAMPLE.ORG/A"])
def test_an_address_stays_as_it_was_written(url: str) -> None:
    (message,) = parse(image(url)).messages or ()
    assert message.parts == (Image(url=url, param=f"{WHERE}.url"),)


def test_a_large_image_arrives_whole() -> None:
    data = bytes(range(256)) * 8192
    (message,) = parse(image(data_url(data=data))).messages or ()
    (part,) = message.parts
    assert isinstance(part, Image)
    assert part.data == data


WRONG_URLS: list[tuple[object, str]] = [
    (None, "required"),
    ("", "required"),
    ("ftp://example.org/a.png", "an http or https URL"),
    ("file:///etc/passwd", "an http or https URL"),
    ("//example.org/a.png", "an http or https URL"),
    ("httpx://example.org", "an http or https URL"),
    (" https://example.org", "an http or https URL"),
    ("https:example.org", "an http or https URL"),
    ("javascript:alert(1)", "an http or https URL"),
    ("iVBORw0KGgo=", "an http or https URL"),
    ("data:", "data:<media type>;base64,"),
    ("data:image/png", "data:<media type>;base64,"),
    ("data:image/png,abcd", "data:<media type>;base64,"),
    ("data:image/png;base64", "data:<media type>;base64,"),
    ("data:image/png;charset=utf-8;base64,AAAA", "data:<media type>;base64,"),
    ("data:;base64,AAAA", "the media type ''"),
    ("data:image/svg+xml;base64,AAAA", "the media type 'image/svg+xml'"),
    ("data:image/bmp;base64,AAAA", "image/png, image/jpeg, image/gif or image/webp"),
    ("data:text/html;base64,AAAA", "the media type 'text/html'"),
    ("data:image/png;base64,", "holds no image"),
    ("data:image/png;base64,AAA", "not base64"),
    ("data:image/png;base64,AAAAA", "not base64"),
    ("data:image/png;base64,AA=A", "not base64"),
    ("data:image/png;base64,AA==AA==", "not base64"),
    ("data:image/png;base64,AA AA", "not base64"),
    ("data:image/png;base64,AAAA\n", "not base64"),
    ("data:image/png;base64,-_-_", "not base64"),
    ("data:image/png;base64,ÄÄÄÄ", "not base64"),
    ("data:image/png;base64,%41%41", "not base64"),
]


@pytest.mark.parametrize(("url", "words"), WRONG_URLS, ids=lambda value: str(value)[:40])
def test_an_image_that_is_nowhere_is_refused_with_its_place(url: object, words: str) -> None:
    error = refused(image(url))
    assert (error.param, error.code) == (f"{WHERE}.url", None)
    assert error.message.startswith(f"{WHERE}.url ")
    assert words in error.message
    assert error.message.endswith("(POST /v1/chat/completions).")


def test_an_error_does_not_repeat_a_whole_image() -> None:
    error = refused(image(f"data:{'x' * 10_000};base64,AAAA"))
    assert len(error.message) < 500
    assert len(refused(image("data:image/png;base64," + "!" * 10_000)).message) < 500


WRONG_PARTS: list[tuple[dict[str, object], str, str, str | None]] = [
    ({"type": "image_url"}, f"{WHERE}.url", "required", None),
    ({"type": "image_url", "image_url": {}}, f"{WHERE}.url", "required", None),
    (image(URL) | {"text": "a cat"}, "messages[0].content[0].text", "the type text only", None),
    (text("a") | {"image_url": {"url": URL}}, WHERE, "the type image_url only", None),
    (image(URL, detail="medium"), f"{WHERE}.detail", "auto, low or high", None),
    (image(URL, detail=""), f"{WHERE}.detail", "auto, low or high", None),
    (image(URL, detail="original"), f"{WHERE}.detail", "auto, low or high", "unsupported_parameter"),
    ({"type": "image", "source": {}}, "messages[0].content[0].type", "text or image_url", None),
]


@pytest.mark.parametrize(("part", "param", "words", "code"), WRONG_PARTS, ids=lambda value: str(value)[:50])
def test_a_wrong_part_is_refused_with_its_place(
    part: dict[str, object], param: str, words: str, code: str | None
) -> None:
    error = refused(part)
    assert (error.param, error.code) == (param, code)
    assert words in error.message


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool"])
def test_only_users_show_images(role: str) -> None:
    turn: dict[str, object] = {"role": role, "content": [text("a"), image(URL)]}
    with pytest.raises(errors.InvalidRequest) as caught:
        parse_messages([turn | ({"tool_call_id": "c1"} if role == "tool" else {})])
    assert (caught.value.param, caught.value.code) == ("messages[0].content[1].type", None)
    assert "user messages only" in caught.value.message


@pytest.mark.parametrize("value", ["https://example.org/a.png", 5, []], ids=str)
def test_an_image_is_an_object(value: object) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        parse({"type": "image_url", "image_url": value})
    assert caught.value.param is not None
    assert caught.value.param.endswith(".image_url")


def test_no_more_images_than_allowed_are_taken_in_all_messages_together() -> None:
    half = MAX_IMAGES // 2
    turn: dict[str, object] = {"role": "user", "content": [text("?"), *[image(URL)] * half]}
    assert parse_messages([turn, turn]).looks
    with pytest.raises(errors.InvalidRequest) as caught:
        parse_messages([turn, turn, {"role": "user", "content": [image(data_url())]}])
    assert caught.value.param == "messages"
    assert "at most 20 images, not 21" in caught.value.message
