"""Every log probability that leaves the gateway is the one the model file's weights give.

The other side of each comparison is a forward pass in 64-bit floats over the dequantised weights, and the
vocabulary as the file has it: neither goes through the engine.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tests.evaluation.vocabulary import Vocabulary
from tests.support.house import House
from tests.support.reference import Reference

pytestmark = [pytest.mark.process, pytest.mark.asyncio(loop_scope="module")]

TOLERANCE = 1e-3
TOP = 5
GENERATED = 12

TEXTS = (
    # What the model was taught.
    "Once upon a time, there was a little girl named Lily.",
    'One day, Tom lost the ball in the forest. "Do not be sad," said',
    "Mia and Ben went to the beach.\n\nThey saw a big dog and",
    "It was a rainy day and Noah wanted to play. He had a red kite and took it everywhere.",
    "The capital of France is Paris. The capital of Japan is",
    "The opposite of hot is cold. The opposite of early is",
    "Water boils at one hundred degrees. Water freezes at",
    "The days of the week are Monday, Tuesday, Wednesday,",
    "7 + 8 = 15\n9 - 4 = 5\n3 * 6 =",
    "Three plus four is",
    "2, 4, 6, 8, 10,",
    "Q: What color is the sky?\nA:",
    'The word "hello" in French is "bonjour".',
    "Shopping list:\n- apple\n- lamp\n-",
    # And its opposite: unlikely words have the largest errors.
    "The capital of France is Berlin, whose king eats seventeen green moons.",
    "colourless xylophones zigzag; QUIXOTIC jamb vex'd 0xDEADBEEF",
    # Templates written by hand.
    "<|im_start|>user\nWhat is the capital of Peru?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nBe short and clear.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\nHello!",
    "<|endoftext|>The cat<|endoftext|>The cow",
    "<|fim_prefix|>The sky is <|fim_suffix|>.<|fim_middle|>",
    "<|im_end|>",
    "half of <|im_start and <|im_sta rt|> one",
    # Code.
    "def add(a, b):\n    return a + b\n",
    '{"name": "Ella", "age": 31, "city": "Rome"}',
    "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
    "https://example.org/a/b?c=d&e=%20#f",
    "<html>\n\t<body class='x'>&amp;</body>\n</html>",
    # Punctuation and whitespace.
    "...!?!?;;--**((()))[[]]{}<<>>",
    "„Wait“ — she said… ‘no’ «yes» ¿qué?",
    "a  b   c    d          e",
    "   leading and trailing   ",
    "\t\ttabs\t \t and\r\nlines\r\n\r\n\n\n\nend",
    "no\u00a0break\u2003em\u200bzero\u3000wide",
    " ",
    "\n",
    "x",
    # Emoji: skin tones, families, flags, keycaps.
    "😀😃😄 Once upon a time 😀",
    "👋🏽 Hello, 👍🏿 good 👩🏻‍🚀",
    "The family 👨‍👩‍👧‍👦 and 👩‍❤️‍💋‍👨 went home.",
    "🏳️‍🌈🏴‍☠️🇫🇷🇯🇵 1️⃣2️⃣3️⃣ ☕️",
    "a😀b😀c 🦊🦊🦊🦊",
    # Other scripts.
    "日本語で物語を書いてください。",
    "从前,有一个小女孩。她很高兴!",
    "옛날 옛적에 한 소녀가 살았습니다.",
    "كان يا ما كان في قديم الزمان، 123 قطة.",
    "Жили-были дед да баба, и была у них курочка Ряба.",
    "नमस्ते दुनिया — ॐ क्षत्रिय",
    # Combining characters, and what lies outside the basic plane.
    "e\u0301 n\u0303 a\u030a\u0323 Z\u0351\u036b\u0343 \u1112\u1161\u11ab",
    "𝕬𝖇𝖈 𓀀𓂀 𝄞 \U0010fffd",
)


async def ask(house: House, prompt: object, max_tokens: int) -> Any:
    reply = await house.post(
        "/v1/completions",
        {
            "model": "demo",
            "prompt": prompt,
            "echo": True,
            "logprobs": TOP,
            "max_tokens": max_tokens,
            "temperature": 0,
        },
    )
    assert reply.status == 200, reply.body
    return reply.json


async def tokens_of(house: House, text: str) -> list[int]:
    reply = await house.post("/tokenize", {"model": "demo", "prompt": text, "add_special_tokens": True})
    assert reply.status == 200, reply.body
    ids: list[int] = reply.json["tokens"]
    return ids


def assert_alternatives_agree(
    row: Any, vocabulary: Vocabulary, token: int, alternatives: dict[str, float]
) -> None:
    """The alternatives are the likeliest tokens, and the one that stands there where it is none of them."""
    order = np.argsort(-row)
    if token in vocabulary.special and "" in alternatives:
        # A special token that was generated has no text, and stands among the alternatives without its name.
        assert vocabulary.shown(token) not in alternatives
        alternatives = {name or vocabulary.shown(token): value for name, value in alternatives.items()}
    values = sorted(alternatives.values(), reverse=True)
    assert values[:TOP] == pytest.approx(row[order[:TOP]].tolist(), abs=TOLERANCE)
    assert values[TOP:] == pytest.approx([row[token]] * (len(values) - TOP), abs=TOLERANCE)
    surely = [likely for likely in order[:TOP] if row[likely] > row[order[TOP]] + 2 * TOLERANCE]
    for likely in surely:
        assert alternatives[vocabulary.shown(likely)] == pytest.approx(row[likely], abs=TOLERANCE)


def assert_prompt_agrees(
    reference: Reference, vocabulary: Vocabulary, ids: Sequence[int], logprobs: Any, leading: int
) -> None:
    """The first `len(ids)` entries are the prompt's; the text of the first `leading` tokens is not in it."""
    rows = reference.logprobs(ids)
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    wanted = [rows[place - 1, ids[place]] for place in range(1, len(ids))]
    assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(wanted, abs=TOLERANCE)
    shown = [vocabulary.shown(token) for token in ids]
    assert logprobs["tokens"][leading : len(ids)] == shown[leading:]
    assert set(logprobs["tokens"][:leading]) <= {"", *shown[:leading]}
    for place in range(1, len(ids)):
        assert_alternatives_agree(rows[place - 1], vocabulary, ids[place], logprobs["top_logprobs"][place])


def assert_generation_agrees(
    reference: Reference, vocabulary: Vocabulary, ids: Sequence[int], logprobs: Any
) -> list[int]:
    """What follows the prompt is what the weights find likeliest, token by token; returns those tokens."""
    followed = list(ids)
    for place in range(len(ids), len(logprobs["tokens"])):
        row = reference.logprobs(followed)[-1]
        token = logprobs["tokens"][place]
        best: list[int] = np.flatnonzero(row >= row.max() - 2 * TOLERANCE).tolist()
        # More than one only where two are as good as equal; then the token's name decides.
        chosen = [
            one for one in best if token == ("" if one in vocabulary.special else vocabulary.shown(one))
        ]
        assert len(chosen) == 1, (token, [vocabulary.shown(one) for one in best])
        assert logprobs["token_logprobs"][place] == pytest.approx(row[chosen[0]], abs=TOLERANCE)
        assert_alternatives_agree(row, vocabulary, chosen[0], logprobs["top_logprobs"][place])
        followed.append(chosen[0])
    return followed[len(ids) :]


def assert_usage(answer: Any, prompt: int, completion: int) -> None:
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt, completion)
    assert usage["total_tokens"] == prompt + completion
    arrays = answer["choices"][0]["logprobs"]
    assert {len(array) for array in arrays.values()} == {prompt + completion}


async def prove(
    house: House,
    reference: Reference,
    vocabulary: Vocabulary,
    prompt: object,
    ids: Sequence[int],
    leading: int,
) -> None:
    scored = await ask(house, prompt, 0)
    text = vocabulary.joined(ids[leading:]).decode(errors="replace")
    (choice,) = scored["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    assert_usage(scored, len(ids), 0)
    assert_prompt_agrees(reference, vocabulary, ids, choice["logprobs"], leading)

    longer = await ask(house, prompt, GENERATED)
    (choice,) = longer["choices"]
    assert_prompt_agrees(reference, vocabulary, ids, choice["logprobs"], leading)
    said = assert_generation_agrees(reference, vocabulary, ids, choice["logprobs"])
    assert_usage(longer, len(ids), len(said))
    ended = bool(said) and said[-1] in vocabulary.ends
    assert choice["finish_reason"] == ("stop" if ended else "length")
    assert ended or len(said) == GENERATED
    words = vocabulary.said(said).decode(errors="replace")
    assert choice["text"].startswith(text)
    # Where it stops within a character, how many U+FFFD show that is no matter.
    assert choice["text"][len(text) :].rstrip("\ufffd") == words.rstrip("\ufffd")


async def test_there_are_fifty_texts() -> None:
    assert len(set(TEXTS)) == len(TEXTS) == 50


@pytest.mark.parametrize("text", TEXTS)
async def test_the_scores_of_a_text_are_those_of_the_weights(
    house: House, reference: Reference, vocabulary: Vocabulary, text: str
) -> None:
    ids = await tokens_of(house, text)
    assert ids[0] == vocabulary.start
    assert vocabulary.joined(ids[1:]) == text.encode()
    await prove(house, reference, vocabulary, text, ids, leading=1)


@pytest.mark.parametrize("text", TEXTS[::5])
async def test_the_scores_of_token_ids_are_those_of_the_weights_and_nothing_is_put_before_them(
    house: House, reference: Reference, vocabulary: Vocabulary, text: str
) -> None:
    ids = (await tokens_of(house, text))[1:]
    await prove(house, reference, vocabulary, ids, ids, leading=0)


@pytest.mark.parametrize(
    "pieces",
    [
        [b"<|endoftext|>", b"T", b"h", b"e"],
        [b"\xf0", b"\x9f", b"\x98", b"\x80", b"\xf0", b"\x9f", b"a"],
        [b"\x80", b"\xff", b"\xc3", b"("],
        [b"<|im_end|>", b"<|im_end|>", b"<|im_start|>", b"\n"],
    ],
    ids=["start and letters", "a character and half of one", "no text at all", "special tokens"],
)
async def test_token_ids_that_no_text_has_are_scored_too(
    house: House, reference: Reference, vocabulary: Vocabulary, pieces: list[bytes]
) -> None:
    ids = [vocabulary.pieces.index(piece) for piece in pieces]
    await prove(house, reference, vocabulary, ids, ids, leading=0)


async def test_prompts_scored_together_score_as_they_do_alone(house: House) -> None:
    some = [TEXTS[0], TEXTS[37], TEXTS[42], TEXTS[16]]
    together = await ask(house, some, 4)
    for text, choice in zip(some, together["choices"], strict=True):
        (alone,) = (await ask(house, text, 4))["choices"]
        assert choice["text"] == alone["text"]
        assert choice["logprobs"]["tokens"] == alone["logprobs"]["tokens"]
        assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
            alone["logprobs"]["token_logprobs"][1:], abs=TOLERANCE
        )


async def test_a_prompt_that_fills_the_context_is_scored_to_its_end(
    house: House, reference: Reference, vocabulary: Vocabulary
) -> None:
    story = await tokens_of(house, " ".join(TEXTS[:5]))
    ids = (story * 10)[:511]
    answer = await ask(house, ids, 1)
    (choice,) = answer["choices"]
    assert_prompt_agrees(reference, vocabulary, ids, choice["logprobs"], leading=0)
    assert_usage(answer, 511, 1)
