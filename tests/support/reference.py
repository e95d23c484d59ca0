"""What a model file says by itself: a forward pass in 64-bit floats, without the engine.

The weights are read from the GGUF by the `gguf` package and dequantised; numpy does the rest. Slow and simple on
purpose: log probabilities that pass through the engine are compared with these.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Reference:
    """A model of the llama architecture, any quantisation that `gguf` can read, its output tied or not."""

    def __init__(self, path: Path | str) -> None:
        reader = GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if fields["general.architecture"] != "llama":
            raise ValueError(f"{path} is not of the llama architecture")
        self._weights: dict[str, Floats] = {
            tensor.name: dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }
        self._layers = int(fields["llama.block_count"])
        self._heads = int(fields["llama.attention.head_count"])
        self._kv_heads = int(fields.get("llama.attention.head_count_kv", self._heads))
        self._epsilon = float(fields["llama.attention.layer_norm_rms_epsilon"])
        self._base = float(fields.get("llama.rope.freq_base", 10000.0))
        width = int(fields["llama.embedding_length"])
        self._head = int(fields.get("llama.attention.key_length", width // self._heads))
        self._rotated = int(fields.get("llama.rope.dimension_count", self._head))

    @property
    def vocabulary(self) -> int:
        return len(self._weights["token_embd.weight"])

    def logprobs(self, ids: Sequence[int]) -> Floats:
        """Natural log probabilities, one row per position: row i is what follows ids[: i + 1]."""
        logits = self._logits(ids)
        highest = logits.max(axis=-1, keepdims=True)
        total = np.exp(logits - highest).sum(axis=-1, keepdims=True)
        return np.asarray(logits - highest - np.log(total))

    def scores(self, ids: Sequence[int]) -> Floats:
        """The natural log probability of each of ids[1:] after those before it."""
        rows = self.logprobs(ids)
        return np.asarray(rows[np.arange(len(ids) - 1), list(ids[1:])])

    def _logits(self, ids: Sequence[int]) -> Floats:
        weights = self._weights
        flow = weights["token_embd.weight"][list(ids)]
        turn = self._turn(len(ids))
        for layer in range(self._layers):
            block = {
                name.split(".", 2)[2]: weight
                for name, weight in weights.items()
                if name.startswith(f"blk.{layer}.")
            }
            flow = flow + self._attention(self._norm(flow, block["attn_norm.weight"]), block, turn)
            inner = self._norm(flow, block["ffn_norm.weight"])
            gate = inner @ block["ffn_gate.weight"].T
            silu = gate / (1 + np.exp(-gate))
            flow = flow + (silu * (inner @ block["ffn_up.weight"].T)) @ block["ffn_down.weight"].T
        output = weights.get("output.weight", weights["token_embd.weight"])
        return np.asarray(self._norm(flow, weights["output_norm.weight"]) @ output.T)

    def _attention(self, flow: Floats, block: dict[str, Floats], turn: NDArray[np.complex128]) -> Floats:
        length = len(flow)

        def heads(name: str, count: int) -> Floats:
            return (flow @ block[name].T).reshape(length, count, -1)

        queries = self._rotate(heads("attn_q.weight", self._heads), turn)
        keys = self._rotate(heads("attn_k.weight", self._kv_heads), turn)
        values = heads("attn_v.weight", self._kv_heads)
        group = self._heads // self._kv_heads
        keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
        match = np.einsum("qhd,khd->hqk", queries, keys) / np.sqrt(self._head)
        match += np.triu(np.full((length, length), -np.inf), 1)
        share = np.exp(match - match.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", share, values).reshape(length, -1)
        return np.asarray(mixed @ block["attn_output.weight"].T)

    def _norm(self, flow: Floats, gain: Floats) -> Floats:
        return np.asarray(flow / np.sqrt((flow * flow).mean(axis=-1, keepdims=True) + self._epsilon) * gain)

    def _turn(self, length: int) -> NDArray[np.complex128]:
        """The rotation of each position: one complex number of length 1 for each pair of dimensions."""
        speeds = self._base ** (-np.arange(0, self._rotated, 2) / self._rotated)
        if "rope_freqs.weight" in self._weights:
            speeds = speeds / self._weights["rope_freqs.weight"]
        return np.asarray(np.exp(1j * np.arange(length)[:, None] * speeds))

    def _rotate(self, heads: Floats, turn: NDArray[np.complex128]) -> Floats:
        """Turn neighbouring dimensions as pairs; dimensions beyond the rotated ones stay."""
        turned = heads.copy()
        pairs = (heads[..., 0 : self._rotated : 2] + 1j * heads[..., 1 : self._rotated : 2]) * turn[:, None]
        turned[..., 0 : self._rotated : 2] = pairs.real
        turned[..., 1 : self._rotated : 2] = pairs.imag
        return turned
