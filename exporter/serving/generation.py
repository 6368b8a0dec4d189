"""Streams of tokens read as text: what a choice of an answer says, piece by piece."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal

from exporter.errors import ExporterError
from exporter.runtime.text import TextStream
from exporter.serving.failures import Failure, failure_of, shutting_down
from exporter.serving.metrics import Watch
from exporter.serving.requests import Step, Stream
from exporter.serving.vocabulary import Vocabulary

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Placed:
    """A token, and how many characters of the choice's text stand in front of it."""

    step: Step
    offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What comes next in choice `index`: text, the tokens that made it, and in the last piece why it ends."""

    index: int
    text: str
    tokens: tuple[Placed, ...]
    finish_reason: FinishReason | None = None


def joined(pieces: Sequence[Piece]) -> Piece:
    """All pieces of one choice as one."""
    text = "".join(piece.text for piece in pieces)
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    return Piece(pieces[0].index, text, tokens, pieces[-1].finish_reason)


class Choice:
    """One of an answer's texts while it is made. `echo`: the prompt comes first, as a piece of its own."""

    def __init__(
        self,
        index: int,
        stream: Stream,
        prompt: Prompt,
        vocabulary: Vocabulary,
        watch: Watch,
        *,
        stops: Sequence[str] = (),
        echo: bool = False,
    ) -> None:
        self.index, self.stream, self.prompt = index, stream, prompt
        self.new_tokens = 0
        self._vocabulary, self._watch, self._stops, self._echo = vocabulary, watch, stops, echo

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces that say something; joined, their texts are the choice's, without stop token or stop string.

        A token comes with the piece that releases its text; of what a stop string cut off, none comes. Raises Failure.
        """
        try:
            async for piece in self._pieces():
                yield piece
        except ExporterError as error:
            raise failure_of(error) from error
        finally:
            self.stream.cancel()

    async def _pieces(self) -> AsyncIterator[Piece]:
        text = TextStream(self._vocabulary.tokenizer, self._stops)
        start = len(self.prompt.text) if self._echo else 0
        released, held, begun = start, [], False
        async for step in self.stream:
            if not begun:
                begun = True
                self._watch.begin(self.stream.cached_tokens)
                if self._echo:
                    yield Piece(self.index, self.prompt.text, self._prompt_tokens())
            if step.id is not None:
                self.new_tokens += 1
                self._watch.token()
            piece = ""
            if step.id is not None and step.reason != "stop":
                held.append(Placed(step, start + text.decoded))
                piece = text.push(step.id)
            if step.reason is not None:
                piece += text.finish()
            reason = self._finish_reason(step, text.stopped)
            released += len(piece)
            whole = reason is not None and not text.stopped
            ready = tuple(token for token in held if whole or token.offset < released)
            held = held[len(ready) :]
            if piece or ready or reason is not None:
                yield Piece(self.index, piece, ready, reason)
            if reason is not None:
                self._watch.end(reason)
                return

    def _finish_reason(self, step: Step, stopped: bool) -> FinishReason | None:
        """A deadline counts as a length: OpenAI's API has no word for it. Raises Failure where nothing was answered."""
        if stopped or step.reason == "stop":
            return "stop"
        if step.reason == "shutdown":
            raise shutting_down()
        if step.reason == "cancelled" or (step.reason == "deadline" and self.new_tokens == 0):
            raise Failure(
                503, "the request's time ended before it was answered", "timeout", headers={"Retry-After": "5"}
            )
        return None if step.reason is None else "length"

    def _prompt_tokens(self) -> tuple[Placed, ...]:
        steps = self.stream.prompt_logprobs or ()
        offsets = self._vocabulary.offsets(self.prompt.ids)
        return tuple(Placed(step, offset) for step, offset in zip(steps, offsets, strict=False))


async def interleaved(choices: Sequence[Choice]) -> AsyncIterator[Piece]:
    """The pieces of several choices as they come; each choice's own stay in order. Every stream ends with this."""
    iterators = {choice.index: choice.pieces() for choice in choices}
    pending = {asyncio.ensure_future(anext(iterator)): index for index, iterator in iterators.items()}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: pending[task]):
                index = pending.pop(task)
                try:
                    piece = task.result()
                except StopAsyncIteration:
                    continue
                pending[asyncio.ensure_future(anext(iterators[index]))] = index
                yield piece
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for choice in choices:
            choice.stream.cancel()


def usage(choices: Sequence[Choice], prompts: int) -> dict[str, object]:
    """Tokens of the `prompts` prompts, each counted once however many choices continue it, and of all answers."""
    firsts = choices[:: max(1, len(choices) // prompts)]
    prompt = sum(len(choice.prompt.ids) for choice in firsts)
    new = sum(choice.new_tokens for choice in choices)
    cached = sum(choice.stream.cached_tokens for choice in firsts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
