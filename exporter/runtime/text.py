"""Tokens to text as they come, without splitting a character or letting a stop string through."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from exporter.errors import InputRefused

UNFINISHED = "\ufffd"  # what the bytes of half a character decode to


def load_tokenizer(directory: Path) -> Tokenizer:
    """tokenizer.json of a bundle, which neither cuts nor pads. InputRefused if it is missing or malformed."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputRefused(
            f"tokenizer.json is missing in {directory}", expected="a fast tokenizer", todo="use token ids, or add it"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise InputRefused(f"{path} is malformed: {str(error)[:200]}", expected="a tokenizers file") from error
    tokenizer.no_truncation()  # what a training run left in the file
    tokenizer.no_padding()
    return tokenizer


class PieceDecoder:
    """Tokens to pieces of whole characters: `step` for each token, `rest` at the end. Never raises for odd bytes."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._ids: list[int] = []  # from the last piece on: what a token says may depend on those before it
        self._told = 0  # of these, those in that piece

    def step(self, token: int) -> str:
        self._ids.append(token)
        piece = self.rest()
        if not piece or piece.endswith(UNFINISHED):
            return ""
        self._ids = self._ids[self._told :]
        self._told = len(self._ids)
        return piece

    def rest(self) -> str:
        """What no piece has told yet; bytes that are no character are U+FFFD."""
        told, text = self._decode(self._ids[: self._told]), self._decode(self._ids)
        if text.startswith(told):
            return text[len(told) :]
        # Byte fallback makes U+FFFD of all bytes in a row once one is broken, of those that a piece has told too.
        return self._decode(self._ids[self._told :])

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


class TextStream:
    """Text of one answer: `push` each token, `finish` once. What they return, joined, is the answer's text.

    `stopped` becomes true when a stop string came; neither it nor anything behind it is returned. A special token,
    which the text leaves out, is a stop string where it is named as one, such as "<|im_end|>".
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self._decoder = PieceDecoder(tokenizer, skip_special_tokens=True)
        self._decoded = 0
        self._pending = ""
        self._stops = [stop for stop in stop_strings if stop]
        added = tokenizer.get_added_tokens_decoder() if self._stops else {}
        self._ends = {number for number, token in added.items() if token.special and token.content in self._stops}
        self.stopped = False

    @property
    def decoded(self) -> int:
        """Characters that the tokens have made so far, those included that are held back."""
        return self._decoded

    def push(self, id: int) -> str:
        if self.stopped:
            return ""
        if id in self._ends:
            text, self.stopped = self.finish(), True
            return text
        return self._release(self._decoder.step(id), held_back=True)

    def finish(self) -> str:
        """What was held back; bytes that never became a character come as U+FFFD."""
        return "" if self.stopped else self._release(self._decoder.rest(), held_back=False)

    def _release(self, text: str, *, held_back: bool) -> str:
        self._decoded += len(text)
        self._pending += text
        found = [at for stop in self._stops if (at := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._pending = self._pending[: min(found)], ""
            return text
        keep = self._possible_stop() if held_back else 0
        cut = len(self._pending) - keep
        text, self._pending = self._pending[:cut], self._pending[cut:]
        return text

    def _possible_stop(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._pending.endswith(stop[:n])), default=0
        )
