"""Tokens to text as they come, without splitting a character or letting a stop string through."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from exporter.errors import InputRefused


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


class TextStream:
    """Text of one answer: `push` each token, `finish` once. What they return, joined, is the answer's text.

    `stopped` becomes true when a stop string came; neither it nor anything behind it is returned.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = self._pending = ""
        self._stops = [stop for stop in stop_strings if stop]
        self.stopped = False

    @property
    def decoded(self) -> int:
        """Characters that the tokens have made so far, those included that are held back."""
        return len(self._decoded)

    def push(self, id: int) -> str:
        if self.stopped:
            return ""
        self._ids.append(id)
        return self._release(self._decoder.step(self._tokenizer, id) or "", held_back=True)

    def finish(self) -> str:
        """What was held back; bytes that never became a character come as U+FFFD, as `decode` gives them."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        return self._release(rest, held_back=False)

    def _release(self, text: str, *, held_back: bool) -> str:
        self._decoded += text
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
