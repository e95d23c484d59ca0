"""service/images.py: a request's images, brought together before anything is held."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.support.until import until
from tests.support.workbench import ANN, request

from headgate.core.accounts import Principal
from headgate.core.completion import CompletionRequest, Image, Message
from headgate.core.errors import InvalidRequest
from headgate.core.files import Owner, UploadedFile
from headgate.core.media import MAX_IMAGES
from headgate.service.images import AT_ONCE, MAX_BYTES_TOGETHER, Images

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
JPEG = b"\xff\xd8\xff\xe0\x00\x10JFIF"
MAX = 8 * 1024 * 1024
UPLOADED = UploadedFile(
    id="9da23599-e713-473b-982c-4328d4f5c78a",
    owner=Owner(account="ann", app="story", user="u1"),
    name="a.png",
    extension="png",
    media_type="image/png",
    size=len(PNG),
    created=0,
    expires=10,
)


class Source:
    """core.ports.ImageSource: a web of these pages, read in small letters. `gate` holds every fetch until it is set."""

    def __init__(self, pages: dict[str, bytes] | None = None) -> None:
        self.pages = pages or {}
        self.checked: list[str] = []
        self.fetched: list[str] = []
        self.callers: set[str] = set()
        self.running = 0
        self.stopped = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def check(self, url: str, param: str, *, caller: str = "") -> str:
        self.callers.add(caller)
        self.checked.append(url)
        if url.lower() not in self.pages:
            raise InvalidRequest(f"{param} leads nowhere.", param=param)
        return url.lower()

    async def fetch(self, url: str, param: str, *, caller: str = "") -> bytes:
        self.callers.add(caller)
        self.fetched.append(url)
        if url not in self.pages:
            raise InvalidRequest(f"{param} leads nowhere.", param=param)
        self.running += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.stopped += 1
            raise
        finally:
            self.running -= 1
        return self.pages[url]

    async def aclose(self) -> None:
        pass


class Shelf:
    """core.ports.Files with one upload on it, of any content."""

    def __init__(self, content: bytes = PNG) -> None:
        self.content = content
        self.asked: list[tuple[str, Owner]] = []

    def reserve(self, file_id: str, account: str, size: int) -> Path:
        raise AssertionError("nothing is saved here")

    def release(self, file_id: str, account: str) -> None:
        raise AssertionError("nothing is saved here")

    def save(self, file: UploadedFile, content: bytes) -> None:
        raise AssertionError("nothing is saved here")

    def load(self, file_id: str, owner: Owner) -> tuple[UploadedFile, bytes] | None:
        self.asked.append((file_id, owner))
        found = (file_id, owner) == (UPLOADED.id, UPLOADED.owner)
        return (UPLOADED, self.content) if found else None


def looking(*parts: str | Image, **fields: Any) -> CompletionRequest:
    text = "".join(part for part in parts if isinstance(part, str))
    message = Message(role="user", content=text, parts=parts)
    return request(messages=(message,), looks=True, app="story", user="u1", **fields)


async def loaded(
    asked: CompletionRequest,
    source: Source | None = None,
    *,
    files: Shelf | None = None,
    keep_urls: bool = False,
    principal: Principal = ANN,
) -> CompletionRequest:
    images = Images(source or Source(), files or Shelf(), MAX)
    return await images.load(asked, principal, keep_urls=keep_urls)


async def refused(asked: CompletionRequest, source: Source | None = None, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        await loaded(asked, source, **fields)
    return caught.value


def images_in(asked: CompletionRequest) -> list[Image]:
    return [part for message in asked.messages or () for part in message.parts if isinstance(part, Image)]


async def test_an_image_by_url_is_fetched_and_its_bytes_say_its_type() -> None:
    source = Source({"http://a/x.png": JPEG})
    asked = looking("What is it?", Image(url="http://a/x.png", detail="low", param="files[0].url"))
    request = await loaded(asked, source)
    assert images_in(request) == [
        Image(data=JPEG, media_type="image/jpeg", detail="low", param="files[0].url")
    ]
    assert source.fetched == ["http://a/x.png"]


async def test_urls_that_are_passed_on_are_only_checked() -> None:
    source = Source({"http://a/x.png": PNG})
    asked = looking(Image(url="http://a/x.png"))
    assert await loaded(asked, source, keep_urls=True) == asked
    assert (source.checked, source.fetched) == (["http://a/x.png"], [])
    error = await refused(looking(Image(url="http://b/", param="files[0].url")), source, keep_urls=True)
    assert error.param == "files[0].url"


async def test_what_is_passed_on_is_what_was_checked_and_not_the_client_s_text() -> None:
    source = Source({"http://a/x.png": PNG})
    asked = looking(Image(url="HTTP://A/x.png", detail="low", param="here"))
    (image,) = images_in(await loaded(asked, source, keep_urls=True))
    assert image == Image(url="http://a/x.png", detail="low", param="here")


async def test_each_account_asks_in_its_own_name() -> None:
    source = Source({"http://a/x.png": PNG})
    asked = looking(Image(url="http://a/x.png"))
    bob = Principal(account="bob", key_id="k2")
    await loaded(asked, source)
    await loaded(asked, source, principal=bob, keep_urls=True)
    assert source.callers == {"ann", "bob"}


async def test_an_upload_is_read_for_the_request_s_own_account_app_and_user() -> None:
    shelf = Shelf()
    asked = looking(Image(file_id=UPLOADED.id, param="files[0].upload_file_id"))
    request = await loaded(asked, files=shelf)
    assert images_in(request) == [Image(data=PNG, media_type="image/png", param="files[0].upload_file_id")]
    assert shelf.asked == [(UPLOADED.id, UPLOADED.owner)]
    # Uploads are sent as data wherever URLs are passed on, too.
    assert images_in(await loaded(asked, files=shelf, keep_urls=True))[0].data == PNG


async def test_an_upload_that_is_not_there_is_named() -> None:
    bob = Principal(account="bob", key_id="k2")
    for asked, who in (
        (looking(Image(file_id="x", param="files[0].upload_file_id")), ANN),
        (looking(Image(file_id=UPLOADED.id, param="files[0].upload_file_id")), bob),
    ):
        error = await refused(asked, principal=who)
        assert error.param == "files[0].upload_file_id"
        assert "the file does not exist or has expired" in error.message


@pytest.mark.parametrize("declared", [None, "image/png", "image/jpeg", "text/html"])
async def test_data_is_looked_at_whatever_it_was_declared_as(declared: str | None) -> None:
    (image,) = images_in(await loaded(looking(Image(data=JPEG, media_type=declared))))
    assert (image.data, image.media_type) == (JPEG, "image/jpeg")


@pytest.mark.parametrize("content", [b"", b"<html>", b"\x89PN"])
async def test_what_is_no_image_is_named(content: bytes) -> None:
    source = Source({"http://a/": content})
    for image in (
        Image(data=content, media_type="image/png", param="here"),
        Image(url="http://a/", param="here"),
        Image(file_id=UPLOADED.id, param="here"),
    ):
        error = await refused(looking("text", image), source, files=Shelf(content))
        assert error.param == "here"
        assert "PNG, JPEG, GIF or WebP" in error.message


async def test_what_is_too_large_is_named_with_the_bound() -> None:
    large = PNG.ljust(MAX + 1, b"x")
    assert images_in(await loaded(looking(Image(data=large[:-1]))))[0].data == large[:-1]
    source = Source({"http://a/": large})
    for image in (
        Image(data=large, param="here"),
        Image(url="http://a/", param="here"),
        Image(file_id=UPLOADED.id, param="here"),
    ):
        error = await refused(looking(image), source, files=Shelf(large))
        assert error.param == "here"
        assert str(MAX) in error.message


async def test_all_images_together_are_bounded() -> None:
    size = MAX_BYTES_TOGETHER // 4
    each = PNG.ljust(size, b"x")
    four = [Image(data=each, param=f"images[{index}]") for index in range(4)]
    assert len(images_in(await loaded(looking(*four)))) == 4
    error = await refused(looking(*four, Image(data=PNG, param="images[4]")))
    assert str(MAX_BYTES_TOGETHER) in error.message
    assert error.param is not None
    assert error.param.startswith("images[")


async def test_too_many_images_are_refused_before_any_is_fetched() -> None:
    source = Source({"http://a/": PNG})
    many = [Image(url="http://a/", param=f"files[{index}].url") for index in range(MAX_IMAGES + 1)]
    error = await refused(looking(*many), source)
    assert error.param == f"files[{MAX_IMAGES}].url"
    assert str(MAX_IMAGES) in error.message
    assert source.fetched == []
    assert len(images_in(await loaded(looking(*many[:-1]), source))) == MAX_IMAGES


async def test_texts_and_images_of_all_messages_keep_their_places() -> None:
    source = Source({"http://a/": PNG, "http://b/": JPEG})
    asked = request(
        messages=(
            Message(role="system", content="Look."),
            Message(
                role="user",
                content="onetwo",
                parts=("one", Image(url="http://b/"), "two", Image(data=PNG), Image(url="http://a/")),
            ),
            Message(role="assistant", content="Nice."),
            Message(role="user", content="more", parts=(Image(data=JPEG), "more")),
        ),
        looks=True,
    )
    loaded_request = await loaded(asked, source)
    png, jpeg = Image(data=PNG, media_type="image/png"), Image(data=JPEG, media_type="image/jpeg")
    assert loaded_request.messages is not None
    assert [message.parts for message in loaded_request.messages] == [
        (),
        ("one", jpeg, "two", png, png),
        (),
        (jpeg, "more"),
    ]
    assert [message.content for message in loaded_request.messages] == ["Look.", "onetwo", "Nice.", "more"]
    assert loaded_request.request_id == asked.request_id


async def test_several_are_fetched_at_once_but_not_all() -> None:
    urls = [f"http://a/{index}" for index in range(MAX_IMAGES)]
    source = Source(dict.fromkeys(urls, PNG))
    source.gate.clear()
    task = asyncio.ensure_future(loaded(looking(*(Image(url=url) for url in urls)), source))
    await until(lambda: source.running == AT_ONCE)
    for _ in range(10):
        await asyncio.sleep(0)
    assert source.running == len(source.fetched) == AT_ONCE
    source.gate.set()
    assert len(images_in(await task)) == MAX_IMAGES


async def test_one_that_fails_stops_the_others() -> None:
    source = Source({"http://slow/": PNG})
    source.gate.clear()
    asked = looking(Image(url="http://slow/"), Image(url="http://gone/", param="files[1].url"))
    assert (await refused(asked, source)).param == "files[1].url"
    assert (source.running, source.stopped) == (0, 1)


async def test_a_request_that_is_given_up_stops_its_fetches() -> None:
    source = Source({"http://slow/": PNG})
    source.gate.clear()
    task = asyncio.ensure_future(loaded(looking(Image(url="http://slow/")), source))
    await until(lambda: source.running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (source.running, source.stopped) == (0, 1)
