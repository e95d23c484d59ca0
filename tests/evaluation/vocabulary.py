"""The tokens of a model file, read without the engine."""

from collections.abc import Sequence
from pathlib import Path

from gguf import GGUFReader, TokenType


class Vocabulary:
    """A byte-level vocabulary. `pieces` are the tokens' bytes, special tokens by their names.

    `special` are the ids of those, `ends` the ones among them that end a generation.
    """

    def __init__(self, path: Path | str) -> None:
        fields = {name: field.contents() for name, field in GGUFReader(str(path)).fields.items()}
        letters = {letter: byte for byte, letter in enumerate(_letters())}
        control = [kind == TokenType.CONTROL for kind in fields["tokenizer.ggml.token_type"]]
        self.pieces: tuple[bytes, ...] = tuple(
            token.encode() if special else bytes(letters[letter] for letter in token)
            for token, special in zip(fields["tokenizer.ggml.tokens"], control, strict=True)
        )
        self.special = {token for token, special in enumerate(control) if special}
        self.start = int(fields["tokenizer.ggml.bos_token_id"])
        self.ends = {int(fields[f"tokenizer.ggml.{name}_token_id"]) for name in ("eos", "eot")}

    def joined(self, ids: Sequence[int]) -> bytes:
        return b"".join(self.pieces[token] for token in ids)

    def said(self, ids: Sequence[int]) -> bytes:
        """The bytes of generated tokens, of which special ones have no text."""
        return self.joined([token for token in ids if token not in self.special])

    def shown(self, token: int) -> str:
        """The token as OpenAI's log probabilities show it: part of a character by its bytes."""
        try:
            return self.pieces[token].decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.pieces[token])


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary.

    Printable Latin-1 stands for itself, the others in their order for the characters from U+0100 on.
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in itself else next(others)) for byte in range(256)]
