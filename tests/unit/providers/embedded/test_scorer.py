"""Scores from the engine's side door, held against an independent forward pass in 64-bit floats.

How much is computed for them is asked of the scorer itself.
"""

import itertools
import random
from collections.abc import Callable

import msgspec
import numpy as np
import psutil
import pytest
from tests.support.engines import ask, engine, refusal, tokens
from tests.support.reference import Reference

from headgate.config import demo_model_path
from headgate.config.settings import Precision
from headgate.providers.embedded import client, float32, native, scorer
from headgate.providers.embedded.failures import Gone
from headgate.providers.embedded.scorer import Scorer
from headgate.providers.embedded.supervisor import Supervisor

END, TURN = 0, 2
TEXTS = (
    "Once upon a time there was a little bear.",
    "😀😃 smiles 👩‍🚀 and 🇩🇪",
    "中文字符和日本語 한국어",
    "naïve café, ½ Ωmega\n\n\tdef f(x): return x",
    "x" * 90,
)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(demo_model_path())


@pytest.fixture(scope="module")
def open_scorer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Scorer]:
    """`open_scorer()`: a scorer in this process that has scored nothing, for texts of 512 tokens."""
    library = native.library()
    twin = tmp_path_factory.mktemp("scorer") / "float32.gguf"
    float32.dequantise(library, str(demo_model_path()), str(twin))
    return lambda: Scorer(library, str(twin), 512, 1, True)


def scored(scorer: Scorer, ids: list[int], first: int = 0, end: int | None = None) -> list[float]:
    found = scorer.score(ids, first, 0, end=end)["logprobs"]
    assert isinstance(found, list)
    return found


def anything(length: int, seed: int = 1) -> list[int]:
    return random.Random(seed).choices(range(1024), k=length)


async def logprobs(supervisor: Supervisor, ids: list[int], first: int = 0) -> list[float]:
    said = await ask(supervisor, "/score", {"ids": ids, "from": first, "top": 0})
    found: list[float] = said["logprobs"]
    return found


@pytest.mark.parametrize("text", TEXTS)
async def test_scores_are_those_of_the_weights(reference: Reference, text: str) -> None:
    async with engine() as supervisor:
        ids = [END, *await tokens(supervisor, text), END, TURN, *await tokens(supervisor, text)]
        scores = await logprobs(supervisor, ids)
    assert scores == pytest.approx(reference.scores(ids).tolist(), abs=1e-4)


async def test_a_text_of_several_batches_is_scored_alike(reference: Reference) -> None:
    ids = anything(1300)
    async with engine(context=1400) as supervisor:
        scores = await logprobs(supervisor, ids)
    assert scores == pytest.approx(reference.scores(ids).tolist(), abs=5e-4)


async def test_all_positions_at_once_score_like_one_position_at_a_time() -> None:
    async with engine() as supervisor:
        ids = [END, *await tokens(supervisor, "The cat 😀 sat on 中 mats"), END, 7, 8]
        at_once = await logprobs(supervisor, ids)
        single = [await logprobs(supervisor, ids[: at + 1], at) for at in range(1, len(ids))]
    assert [len(one) for one in single] == [1] * (len(ids) - 1)
    assert at_once == pytest.approx([one[0] for one in single], abs=1e-5)


async def test_what_was_scored_before_does_not_change_a_score() -> None:
    ids = anything(300)
    others = (ids[:200] + anything(50, 2), ids[:299], anything(300, 3), [*ids, 5], [ids[0]], ids)
    async with engine() as supervisor:
        fresh = await logprobs(supervisor, ids, 150)
        for other, first in itertools.product(others, (0, 180)):
            await logprobs(supervisor, other, first)
            assert await logprobs(supervisor, ids, 150) == pytest.approx(fresh, abs=1e-5)


async def test_texts_that_take_turns_score_like_each_alone(reference: Reference) -> None:
    begin = anything(150)
    # More than are held at a time, some of which begin alike.
    texts = [begin[: 15 * number] + anything(200 - 15 * number, number) for number in range(11)]
    exact = [reference.scores(ids) for ids in texts]
    async with engine() as supervisor:
        for first, end in itertools.pairwise((1, 100, 120, 121, 160, 161, 200)):
            for ids, expected in zip(texts, exact, strict=True):
                scores = await logprobs(supervisor, ids[:end], first)
                assert scores == pytest.approx(expected[first - 1 : end - 1].tolist(), abs=1e-4)


def test_texts_that_take_turns_are_each_computed_once(open_scorer: Callable[[], Scorer]) -> None:
    texts = [anything(400, seed) for seed in range(4)]
    scorer = open_scorer()
    ends = range(300, 401, 10)
    for end in ends:
        for ids in texts:
            scored(scorer, ids[:end], end - 10)
    # What would follow the last token is not asked for.
    assert scorer.computed == len(texts) * (ends[-1] - 1)


def test_of_more_texts_than_can_be_held_the_latest_are(open_scorer: Callable[[], Scorer]) -> None:
    texts = [anything(100, seed) for seed in range(10)]
    scorer = open_scorer()
    for ids in texts:
        scored(scorer, ids)
    before = scorer.computed
    for ids in texts[-1:1:-1]:
        scored(scorer, [*ids, 5], 100)
    assert scorer.computed - before == 8
    scored(scorer, [*texts[0], 5], 100)
    assert scorer.computed - before == 8 + 100


def test_what_two_texts_begin_with_is_computed_once_and_both_are_kept(
    open_scorer: Callable[[], Scorer], reference: Reference
) -> None:
    begin = anything(300)
    one, other = begin + anything(100, 2), begin + anything(100, 3)
    scorer = open_scorer()
    scored(scorer, one)
    assert scorer.computed == 399
    after = scored(scorer, other, 301)
    assert scorer.computed == 399 + 99
    assert after == pytest.approx(reference.scores(other)[300:].tolist(), abs=1e-4)
    assert scored(scorer, one, 399) == pytest.approx(reference.scores(one)[398:].tolist(), abs=1e-4)
    assert scorer.computed == 399 + 99 + 1


def test_texts_make_room_for_each_other_where_there_is_little(
    open_scorer: Callable[[], Scorer], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "MOST_CELLS", 0)
    texts = [anything(500, seed) for seed in range(3)]
    small = open_scorer()
    for ids in (*texts, *texts):
        assert scored(small, ids, 400) == pytest.approx(reference.scores(ids)[399:].tolist(), abs=1e-4)
    assert small.computed == 6 * 499


def test_slices_one_after_the_other_are_the_whole_and_computed_once(
    open_scorer: Callable[[], Scorer], reference: Reference
) -> None:
    ids = anything(500)
    scorer = open_scorer()
    joined: list[float] = []
    for first in range(0, 500, 128):
        joined += scored(scorer, ids, first, first + 128)
        assert scorer.computed == min(first + 128, 500) - 1
    assert joined == pytest.approx(reference.scores(ids).tolist(), abs=1e-4)


def test_the_ways_to_spell_a_text_share_what_they_begin_with(open_scorer: Callable[[], Scorer]) -> None:
    ids = anything(300)
    scorer = open_scorer()
    ways = ("an ot he r", "an ot h er", "an o th er", "an o t her", "a n ot her", "a n o ther")
    pieces = {piece.decode("latin-1") for piece in scorer.pieces(range(6, 1024))}
    assert all({*way.split()} <= pieces for way in ways)
    scorer.recover(ids, b"another", 4, 0)
    # The last token before the text and three of the text; then from where a way parts from the one before.
    assert scorer.computed == 299 + 4 + 2 + 3 + 2 + 4 + 2


def test_nothing_is_computed_for_a_client_that_left_while_it_waited(
    open_scorer: Callable[[], Scorer],
) -> None:
    ids = anything(100)
    scorer = open_scorer()
    with pytest.raises(Gone):
        scorer.score(ids, 0, 0, has_left=lambda: True)
    with pytest.raises(Gone):
        scorer.recover(ids, b"a", 1, 0, has_left=lambda: True)
    assert scorer.computed == 0
    assert len(scored(scorer, ids)) == 99


async def test_the_likeliest_tokens_come_best_first_with_the_scores_of_their_own(
    reference: Reference,
) -> None:
    async with engine() as supervisor:
        ids = [END, *await tokens(supervisor, TEXTS[0] + TEXTS[1])]
        rows = reference.logprobs(ids)
        # The likeliest token itself follows: then it is the very same number in both places.
        ids.append(int(rows[-1].argmax()))
        said = await ask(supervisor, "/score", {"ids": ids, "from": 0, "top": 5})
    assert len(said["top"]) == len(said["logprobs"]) == len(ids) - 1
    for row, top in zip(rows, said["top"], strict=True):
        assert [id for id, _ in top] == np.argsort(-row)[:5].tolist()
        assert [value for _, value in top] == pytest.approx([row[id] for id, _ in top], abs=1e-4)
    assert said["top"][-1][0] == [ids[-1], said["logprobs"][-1]]
    assert {int(id) for id in said["pieces"]} == {*ids, *(id for top in said["top"] for id, _ in top)}


async def test_from_leaves_out_earlier_positions_and_the_first_has_no_score() -> None:
    ids = anything(20)
    async with engine() as supervisor:
        every = await logprobs(supervisor, ids)
        assert len(every) == 19
        assert await logprobs(supervisor, ids, 1) == pytest.approx(every, abs=1e-5)
        assert await logprobs(supervisor, ids, 12) == pytest.approx(every[11:], abs=1e-5)
        assert await logprobs(supervisor, ids, 20) == []
        assert await logprobs(supervisor, ids[:1]) == []


async def test_to_leaves_out_later_positions() -> None:
    ids = anything(20)
    async with engine() as supervisor:
        every = await logprobs(supervisor, ids)
        for first, end in ((0, 8), (8, 16), (16, 24), (0, 1), (0, 0), (9, 5), (20, 30)):
            said = await ask(supervisor, "/score", {"ids": ids, "from": first, "to": end, "top": 1})
            expected = every[max(1, first) - 1 : max(1, end) - 1] if first < end else []
            assert said["logprobs"] == pytest.approx(expected, abs=1e-5)
            likeliest = {top[0][0] for top in said["top"]}
            assert {int(id) for id in said["pieces"]} == {*ids[first:end], *likeliest}


async def test_float32_is_exact_and_stored_weights_are_not(reference: Reference) -> None:
    ids = anything(200)
    exact = reference.scores(ids)
    precisions: tuple[Precision, ...] = ("auto", "float32", "stored")
    off = {}
    for precision in precisions:
        async with engine(precision=precision) as supervisor:
            off[precision] = float(np.abs(np.array(await logprobs(supervisor, ids)) - exact).max())
    assert off["auto"] == off["float32"] < 1e-4
    assert 1e-3 < off["stored"] < 1


async def test_generated_tokens_score_like_given_ones() -> None:
    body = {"prompt": [END, 45, 78], "n_predict": 24, "n_probs": 1, "temperature": 0, "return_tokens": True}
    async with engine() as supervisor:
        answer = msgspec.json.decode(
            await client.post(supervisor.address(), "/completion", msgspec.json.encode(body), 1 << 20)
        )
        entries = answer["completion_probabilities"]
        ids = [entry["id"] for entry in entries]
        scores = await logprobs(supervisor, [END, 45, 78, *ids], 3)
    assert len(ids) > 4
    assert scores == pytest.approx([entry["logprob"] for entry in entries], abs=1e-4)


@pytest.mark.parametrize("character", ["😀", "中", "é", "👩‍🚀"])
async def test_the_tokens_of_a_split_character_are_found_again(reference: Reference, character: str) -> None:
    raw = character.encode()
    async with engine() as supervisor:
        before = [END, *await tokens(supervisor, "I am ")]
        split = await tokens(supervisor, character)
        body = {"ids": before, "text": raw.decode("latin-1"), "count": len(split), "top": 2}
        said = await ask(supervisor, "/recover", body)
        pieces = (await ask(supervisor, "/pieces", {"ids": said["ids"]}))["pieces"]
    assert "".join(pieces).encode("latin-1") == raw
    assert said["ids"] == split
    expected = reference.scores([*before, *split])[len(before) - 1 :]
    assert said["logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [len(top) for top in said["top"]] == [2] * len(split)


async def test_of_several_ways_to_spell_a_text_the_most_probable_is_taken(reference: Reference) -> None:
    before = [END, 45, 78]
    async with engine() as supervisor:
        vocabulary = (await ask(supervisor, "/pieces", {"ids": list(range(6, 1024))}))["pieces"]
        said = await ask(supervisor, "/recover", {"ids": before, "text": "there", "count": 3, "top": 0})
    ids = {piece: id for id, piece in enumerate(vocabulary, 6)}
    splits = [
        ("there"[:one], "there"[one:two], "there"[two:])
        for one, two in itertools.combinations(range(1, 5), 2)
    ]
    ways = [[ids[part] for part in parts] for parts in splits if ids.keys() >= {*parts}]
    assert len(ways) > 1
    assert said["ids"] == max(ways, key=lambda way: reference.scores([*before, *way])[2:].sum())


@pytest.mark.parametrize("text", TEXTS)
async def test_the_pieces_of_a_text_join_to_its_bytes(text: str) -> None:
    async with engine() as supervisor:
        ids = await tokens(supervisor, text)
        pieces = (await ask(supervisor, "/pieces", {"ids": ids}))["pieces"]
    assert len(pieces) == len(ids)
    assert "".join(pieces).encode("latin-1") == text.encode()


async def test_special_tokens_have_their_text_and_their_place_in_the_vocabulary() -> None:
    async with engine() as supervisor:
        pieces = (await ask(supervisor, "/pieces", {"ids": [0, 1, 2, 3]}))["pieces"]
        vocabulary = await ask(supervisor, "/vocabulary", {})
    assert pieces == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>"]
    assert vocabulary == {
        **{"size": 1024, "start": 0, "end": 0, "adds_start": True},
        **{"infill_prefix": 3, "infill_suffix": 4, "infill_middle": 5},
    }


async def test_an_engine_that_has_not_scored_stays_small() -> None:
    async with engine() as supervisor:
        await ask(supervisor, "/vocabulary", {})
        await ask(supervisor, "/pieces", {"ids": list(range(1024))})
        assert psutil.Process(supervisor.status().pid).memory_info().rss < 70 * 1024 * 1024


BAD: tuple[tuple[str, dict[str, object], str], ...] = (
    ("/score", {"ids": [], "top": 1}, "empty"),
    ("/score", {"ids": [5, 1024], "top": 1}, "1024 is outside the vocabulary of 1024"),
    ("/score", {"ids": [5, -1], "top": 1}, "-1 is outside"),
    ("/score", {"ids": [5, 2**70], "top": 1}, "outside"),
    ("/score", {"ids": [5, True], "top": 1}, "ids must be"),
    ("/score", {"ids": [5, "6"], "top": 1}, "ids must be"),
    ("/score", {"ids": "5 6", "top": 1}, "ids must be"),
    ("/score", {"ids": [5] * 517, "top": 1}, "517 tokens are more than the context of 512"),
    ("/score", {"ids": [5, 6], "top": 1001}, "top must be"),
    ("/score", {"ids": [5, 6], "top": -1}, "top must be"),
    ("/score", {"ids": [5, 6], "top": 1.5}, "top must be"),
    ("/score", {"ids": [5, 6], "from": -1}, "from must be"),
    ("/score", {"ids": [5, 6], "to": -1}, "to must be"),
    ("/score", {"ids": [5, 6], "to": None}, "to must be"),
    ("/pieces", {"ids": [1024]}, "outside"),
    ("/pieces", {}, "ids must be"),
    ("/recover", {"ids": [], "text": "a", "count": 1}, "empty"),
    ("/recover", {"ids": [5], "text": "a", "count": 2}, "no 2 tokens"),
    ("/recover", {"ids": [5], "text": "<|im_end|>", "count": 1}, "no 1 tokens"),
    ("/recover", {"ids": [5], "text": "", "count": 1}, "text must have"),
    ("/recover", {"ids": [5], "text": "a" * 257, "count": 9}, "text must have"),
    ("/recover", {"ids": [5], "text": "a", "count": 0}, "count"),
    ("/recover", {"ids": [5], "text": "中", "count": 3}, "latin-1"),
    ("/recover", {"ids": [5] * 516, "text": "a", "count": 1}, "more than the context"),
)


async def test_what_cannot_be_scored_is_refused_with_the_reason_and_harms_nothing() -> None:
    ids = anything(40)
    async with engine() as supervisor:
        pid = supervisor.status().pid
        before = await logprobs(supervisor, ids)
        for path, body, reason in BAD:
            status, said = await refusal(supervisor, path, body)
            assert (status, reason in said) == (400, True), (path, body, said)
        assert await logprobs(supervisor, ids) == before
        assert supervisor.status().pid == pid
