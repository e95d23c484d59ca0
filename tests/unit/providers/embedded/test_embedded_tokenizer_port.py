"""The embedded provider as a tokenizer for clients."""

from collections.abc import Awaitable, Callable

import msgspec
import pytest

from headgate.core.errors import InvalidRequest, ModelUnavailable
from headgate.core.models import ModelSpec
from headgate.core.ports import Tokenizer
from headgate.providers.embedded.gguf import read_gguf
from headgate.providers.embedded.prompts import MAX_IDS, MAX_TEXT, Prompts
from headgate.providers.embedded.provider import EmbeddedProvider
from headgate.providers.embedded.schemas import Schemas
from headgate.providers.embedded.side_door import SideDoor

StartProvider = Callable[..., Awaitable[EmbeddedProvider]]


@pytest.fixture
async def tokenizer(start_provider: StartProvider) -> Tokenizer:
    return (await start_provider()).tokenizer


@pytest.mark.parametrize("text", ["The capital of France is", "日本 🎉👩‍👩‍👧 é\u0301", "a\x00b\n\t ", ""])
async def test_a_text_becomes_ids_and_they_become_the_text(
    tokenizer: Tokenizer, demo: ModelSpec, text: str
) -> None:
    ids = await tokenizer.tokenize(demo, text, add_special=False, parse_special=True)
    assert await tokenizer.detokenize(demo, ids) == text
    begun = await tokenizer.tokenize(demo, text, add_special=True, parse_special=True)
    assert begun == (0, *ids)


async def test_special_tokens_are_parsed_only_on_request_and_written_out(
    tokenizer: Tokenizer, demo: ModelSpec
) -> None:
    text = "<|im_start|>user"
    parsed = await tokenizer.tokenize(demo, text, add_special=False, parse_special=True)
    plain = await tokenizer.tokenize(demo, text, add_special=False, parse_special=False)
    assert len(parsed) < len(plain)
    assert await tokenizer.detokenize(demo, parsed) == await tokenizer.detokenize(demo, plain) == text


async def test_half_a_character_is_shown_as_such(tokenizer: Tokenizer, demo: ModelSpec) -> None:
    ids = await tokenizer.tokenize(demo, "a🎉", add_special=False, parse_special=False)
    assert await tokenizer.detokenize(demo, ids[:-1]) == "a\ufffd"


async def test_the_tokenizer_names_tokens_that_can_be_written(tokenizer: Tokenizer, demo: ModelSpec) -> None:
    info = await tokenizer.describe_tokenizer(demo)
    assert (info.vocabulary_size, info.context_window) == (1024, demo.context_window)
    assert info.adds_start_token
    for name, token in (
        (info.start_token, info.start_token_id),
        (info.end_token, info.end_token_id),
    ):
        assert name is not None
        assert await tokenizer.tokenize(demo, name, add_special=False, parse_special=True) == (token,)


async def test_a_start_token_that_the_model_does_not_name_is_not_made_up(demo: ModelSpec) -> None:
    made_up = {"size": 1024, "start": 11, "end": 0, "adds_start": False}
    made_up |= {"infill_prefix": -1, "infill_suffix": -1, "infill_middle": -1}

    async def post(path: str, body: bytes, most: int) -> bytes:
        answers: dict[str, object] = {
            "/vocabulary": made_up,
            "/pieces": {"pieces": ["<|endoftext|>"]},
            "/tokenize": {"tokens": [0]},
        }
        return msgspec.json.encode(answers[path])

    model = msgspec.structs.replace(read_gguf(demo.file or ""), bos_id=None)
    info = await Prompts(model, 512, post, SideDoor(post), Schemas()).describe(demo)
    assert (info.start_token, info.start_token_id) == (None, None)
    assert (info.end_token, info.end_token_id) == ("<|endoftext|>", 0)


async def test_too_much_at_once_is_refused(tokenizer: Tokenizer, demo: ModelSpec) -> None:
    with pytest.raises(InvalidRequest, match=rf"{MAX_TEXT + 1} bytes") as caught:
        await tokenizer.tokenize(demo, "a" * (MAX_TEXT - 1) + "é", add_special=False, parse_special=False)
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequest, match=rf"at most {MAX_IDS}") as caught:
        await tokenizer.detokenize(demo, [5] * (MAX_IDS + 1))
    assert caught.value.param == "tokens"
    assert len(await tokenizer.detokenize(demo, [5] * MAX_IDS)) >= MAX_IDS


@pytest.mark.parametrize("stranger", [-1, 1024])
async def test_ids_outside_the_vocabulary_are_refused(
    tokenizer: Tokenizer, demo: ModelSpec, stranger: int
) -> None:
    with pytest.raises(InvalidRequest, match=rf"token id {stranger};") as caught:
        await tokenizer.detokenize(demo, [5, stranger])
    assert caught.value.param == "tokens"


async def test_a_model_without_an_engine_has_no_tokenizer(tokenizer: Tokenizer, demo: ModelSpec) -> None:
    gone = msgspec.structs.replace(demo, file="elsewhere.gguf")
    with pytest.raises(ModelUnavailable):
        await tokenizer.tokenize(gone, "text", add_special=False, parse_special=False)
