"""Log probabilities as the scripted upstream writes them: a token always has the same, longer ones are less likely."""

from collections.abc import Sequence
from typing import Any


def legacy_scores(tokens: Sequence[str], alternatives: int, *, unscored: int) -> dict[str, Any]:
    """Parallel arrays; so many tokens at the beginning have no score."""
    logprobs: list[float | None] = [_logprob(token) for token in tokens]
    tops: list[dict[str, float] | None] = [dict(_likeliest(token, alternatives)) for token in tokens]
    for position in range(unscored):
        logprobs[position] = tops[position] = None
    return {
        "tokens": list(tokens),
        "token_logprobs": logprobs,
        "top_logprobs": tops if alternatives else None,
        "text_offset": [0] * len(tokens),
    }


def chat_scores(tokens: Sequence[str], alternatives: int, *, unscored: int) -> dict[str, Any]:
    """An object per token. A chat never repeats its prompt, so there all are scored."""
    assert not unscored
    content = [
        _object(token, _logprob(token))
        | {"top_logprobs": [_object(other, logprob) for other, logprob in _likeliest(token, alternatives)]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _logprob(token: str) -> float:
    return -len(token) / 8


def _likeliest(token: str, alternatives: int) -> list[tuple[str, float]]:
    """The token itself is the likeliest."""
    others = [(f" other{other}", _logprob(token) - other) for other in range(1, 20)]
    return [(token, _logprob(token)), *others][:alternatives]


def _object(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}
