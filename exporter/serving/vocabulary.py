"""A token's own bytes, and where tokens stand in a text."""

import json
import re
from collections.abc import Sequence

from tokenizers import Tokenizer

from exporter.runtime.text import PieceDecoder

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def gpt2_bytes() -> dict[str, int]:
    """GPT-2's alphabet: printable characters of Latin-1 stand for their own byte, the other bytes for U+0100 and on.

    Radford et al. (2019), `bytes_to_unicode` in the released encoder.
    """
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + i): byte for i, byte in enumerate(others)}


GPT2_BYTES = gpt2_bytes()


class Vocabulary:
    """A bundle's tokenizer, and each token's bytes: for byte-level vocabularies (GPT-2's) and SentencePiece's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, bytes] = {}
        self._added = frozenset(tokenizer.get_added_tokens_decoder())
        decoder = json.loads(tokenizer.to_str()).get("decoder") or {}
        self._byte_level = any(part.get("type") == "ByteLevel" for part in decoder.get("decoders") or [decoder])

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def token_bytes(self, id: int) -> bytes:
        """What the token adds to a text, though it may be a part of a character; empty for an id without a token."""
        if id not in self._known:
            self._known[id] = self._bytes(id)
        return self._known[id]

    def offsets(self, ids: Sequence[int]) -> list[int]:
        """For each token of a whole text, how many characters stand in front of it."""
        decoder, found, length = PieceDecoder(self.tokenizer, skip_special_tokens=False), [], 0
        for token in ids:
            found.append(length)
            length += len(decoder.step(token))
        return found

    def _bytes(self, id: int) -> bytes:
        token = self.tokenizer.id_to_token(id)
        if token is None:
            return b""
        if id in self._added:
            return token.encode()
        if self._byte_level:
            return bytes(GPT2_BYTES[character] for character in token if character in GPT2_BYTES)
        byte = BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
