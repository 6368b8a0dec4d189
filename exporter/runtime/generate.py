"""One prompt, one answer: what `exporter generate` does."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import InputRefused, UsageError
from exporter.graph.bundle import Bundle
from exporter.prompts import chat_template, render_instruction, special_tokens
from exporter.runtime.adapters import adapter_template
from exporter.runtime.load import load
from exporter.runtime.runner import Runner
from exporter.runtime.sampling import Sampling
from exporter.runtime.text import TextStream, load_tokenizer


@dataclass(frozen=True, slots=True)
class Generated:
    """An answer: its text without stop token or stop string, and why it ended."""

    text: str
    prompt_tokens: int
    new_tokens: int
    reason: str  # stop (a stop token), stop string, or length (max_new_tokens, or no position left)
    bundle: Path
    precision: str
    provider: str
    adapter: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {field: getattr(self, field) for field in self.__slots__} | {"bundle": str(self.bundle)}


def generate(
    bundle: Path | str | Bundle | Runner,
    *,
    instruction: str | None = None,
    input: str = "",
    prompt: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    adapter: str | None = None,
    target: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    on_text: Callable[[str], object] | None = None,
) -> Generated:
    """The answer to an instruction (through the bundle's chat template), or the continuation of a raw prompt.

    `on_text` gets the answer's pieces as they come; joined they are its text. `adapter` names one that the bundle was
    exported with; its own chat template comes before the bundle's.
    """
    _require_text(instruction or "", input, prompt or "")
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty, seed)
    runner = bundle if isinstance(bundle, Runner) else load(bundle, target=target, provider=provider, threads=threads)
    if adapter is not None:
        runner = runner.with_adapter(adapter)
    directory = runner.bundle.directory
    ids = prompt_ids(directory, instruction=instruction, input=input, prompt=prompt, adapter=runner.adapter)
    answer = Answer(runner, ids, stop)
    pieces = []
    for piece in answer.stream(max_new_tokens, sampling):
        pieces.append(piece)
        if on_text is not None:
            on_text(piece)
    return Generated(
        "".join(pieces),
        len(ids),
        answer.new_tokens,
        answer.reason,
        runner.bundle.directory,
        runner.bundle.precision,
        runner.provider,
        runner.adapter,
    )


def _require_text(*texts: str) -> None:
    """UsageError for bytes of a command line that were no UTF-8: Python makes lone surrogates of them."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not text in UTF-8", expected="UTF-8", todo="convert it first") from error


def prompt_ids(
    directory: Path,
    *,
    instruction: str | None,
    input: str = "",
    prompt: str | None = None,
    adapter: str | None = None,
) -> list[int]:
    """Tokens of exactly one of `instruction` and `prompt`. InputRefused for an instruction without a template."""
    if (instruction is None) == (prompt is None):
        raise UsageError("an instruction and a prompt" if prompt is not None else "nothing to answer", expected="one")
    tokenizer = load_tokenizer(directory)
    if prompt is not None:
        if input:
            raise UsageError("an input beside a raw prompt", expected="--input only with --instruction")
        return tokenizer.encode(prompt).ids
    template = adapter_template(directory, adapter) or chat_template(directory)
    if template is None:
        raise InputRefused(
            f"{directory} has no chat template",
            expected="chat_template.jinja",
            todo="name a template in the spec's [prompt], or give --prompt",
        )
    text = render_instruction(template, instruction or "", input, special_tokens=special_tokens(directory))
    return tokenizer.encode(text, add_special_tokens=False).ids  # the template has written them already


class Answer:
    """One prompt's answer while it is made: `new_tokens` and `reason` are known when `stream` has ended."""

    def __init__(self, runner: Runner, ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._runner, self._ids = runner, list(ids)
        self._text = TextStream(load_tokenizer(runner.bundle.directory), stop)
        self.new_tokens, self.reason = 0, "length"

    def stream(self, max_new_tokens: int, sampling: Sampling) -> Iterator[str]:
        """Pieces of the text as they come: whole characters, without the stop token or a stop string."""
        for token in self._runner.stream([self._ids], max_new_tokens, sampling):
            self.new_tokens += 1
            self.reason = token.reason or self.reason
            if token.reason != "stop" and (piece := self._text.push(token.id)):
                yield piece
            if self._text.stopped:
                self.reason = "stop string"
                return
        if piece := self._text.finish():
            yield piece
        if self._text.stopped:
            self.reason = "stop string"
