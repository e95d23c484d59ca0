"""Images on their way to an OpenAI-compatible upstream."""

from base64 import b64decode

from tests.support.asking import nothing, streamed
from tests.support.jobs import job
from tests.support.upstream import Upstream

from headgate.core.completion import Image, Message
from headgate.providers.openai_compatible import OpenAICompatible

PIXELS = bytes(range(256)) * 3


async def test_text_and_images_keep_their_order(upstream: Upstream, provider: OpenAICompatible) -> None:
    parts = (
        "This",
        Image(url="https://pictures.example/a.png?x=1&y=é", detail="low"),
        "or this?",
        Image(data=PIXELS, media_type="image/webp"),
    )
    messages = (
        Message(role="system", content="Look."),
        Message(role="user", content="This or this?", parts=parts),
    )
    await provider.complete(job(messages=messages), nothing)
    system, user = upstream.requests[0].json["messages"]
    assert system == {"role": "system", "content": "Look."}
    assert user["role"] == "user"
    data = user["content"].pop()
    assert user["content"] == [
        {"type": "text", "text": "This"},
        {
            "type": "image_url",
            "image_url": {"url": "https://pictures.example/a.png?x=1&y=é", "detail": "low"},
        },
        {"type": "text", "text": "or this?"},
    ]
    head, _, encoded = data["image_url"].pop("url").partition(",")
    assert head == "data:image/webp;base64"
    assert b64decode(encoded, validate=True) == PIXELS
    assert data == {"type": "image_url", "image_url": {}}


async def test_a_message_of_nothing_but_an_image(upstream: Upstream, provider: OpenAICompatible) -> None:
    image = Image(data=PIXELS, media_type="image/png", detail="auto")
    await streamed(provider, job(messages=(Message(role="user", content="", parts=(image,)),)))
    [message] = upstream.requests[0].json["messages"]
    [part] = message["content"]
    assert part["image_url"]["detail"] == "auto"
    assert part["image_url"]["url"].startswith("data:image/png;base64,AAECAwQ")
