"""The texts that are compared: prompt + reference answer + end of text, with the scope of every token.

The fixed words of a prompt template are fed but not scored: they are the same in every document and would drown what
differs. Instruction and input are scored as `prompt`, the answer as `response`, free text as `text`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from exporter.errors import InputRefused
from exporter.json_text import parse_json
from exporter.prompts import render_instruction, takes_input

PACKAGED = Path(__file__).with_name("prompts")
SENTINEL = "\ufdd0"  # A noncharacter: no prompt contains it.
TODAY = "2024-07-26"  # to templates that ask for the date: captures and killed runs must find the same tokens later
FED, PROMPT, RESPONSE, TEXT = 0, 1, 2, 3
SCOPE_NAMES = np.array(["fed", "prompt", "response", "text"])

Level = Literal["commit", "nightly", "release"]


@dataclass(frozen=True, slots=True)
class LevelSize:
    """How much of the prompts a level uses."""

    documents: int | None
    response_tokens: int | None
    texts: bool


LEVELS: dict[str, LevelSize] = {
    "commit": LevelSize(documents=32, response_tokens=64, texts=False),
    "nightly": LevelSize(documents=None, response_tokens=256, texts=False),
    "release": LevelSize(documents=None, response_tokens=None, texts=True),
}


@dataclass(frozen=True, slots=True)
class Document:
    """`scope` (T,) says what each token is; token t > 0 is predicted by the logits at position t - 1."""

    index: int
    tokens: tuple[int, ...]
    scope: NDArray[np.uint8]
    truncated: bool = False

    @property
    def positions(self) -> NDArray[np.int64]:
        """The logit rows that predict a scored token, (N,)."""
        return np.flatnonzero(self.scope[1:] != FED)

    @property
    def targets(self) -> NDArray[np.int64]:
        """The scored tokens, (N,)."""
        return np.asarray(self.tokens, dtype=np.int64)[self.positions + 1]

    @property
    def target_scopes(self) -> NDArray[np.str_]:
        """The scope name of each scored token, (N,)."""
        return SCOPE_NAMES[self.scope[self.positions + 1]]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a prompts file: an instruction with its answer, or a free text."""

    instruction: str = ""
    input: str = ""
    output: str = ""
    text: str = ""


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file, `{"instruction", "input", "output"}` or `{"text"}`; InputRefused names a bad line."""
    if not path.is_file():
        raise InputRefused(f"there is no prompts file {path}", expected="a JSONL file", todo="check the path")
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputRefused(
            f"{path} is not UTF-8 ({error.reason} at byte {error.start})", expected="JSONL in UTF-8"
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_row(path, number, line))
    if not rows:
        raise InputRefused(f"{path} holds no prompts", expected='rows {"instruction", "input", "output"} or {"text"}')
    return rows


def level_rows(rows: Sequence[Row], level: Level, packaged: bool) -> list[Row]:
    """The rows a level uses. The odd-numbered first: thresholds were calibrated on the even-numbered ones."""
    size = LEVELS[level]
    ordered = [*rows[1::2], *rows[0::2]]
    chosen = ordered[: size.documents]
    if size.texts and packaged:
        chosen += read_rows(PACKAGED / "texts.jsonl")
    return chosen


def build_documents(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    *,
    template: str | None,
    special_tokens: Mapping[str, str] | None = None,
    end_of_text: int | None,
    context: int,
    response_tokens: int | None,
) -> list[Document]:
    """Tokenize rows. What does not fit into `context` tokens is cut off at the end, and the document says so.

    special_tokens: what the template may name, such as bos_token.
    """
    render = _Renderer(template, special_tokens or {})
    documents = []
    for row in rows:
        tokens, scope = _tokenize_text(row, tokenizer) if row.text else _tokenize_pair(row, tokenizer, render)
        if end_of_text is not None:
            tokens, scope = [*tokens, end_of_text], [*scope, TEXT if row.text else RESPONSE]
        truncated = len(tokens) > context
        tokens, scope = tokens[:context], scope[:context]
        if response_tokens is not None and not row.text:
            tokens, scope = _limit_response(tokens, scope, response_tokens)
        if len(tokens) > 1:
            documents.append(Document(len(documents), tuple(tokens), np.array(scope, np.uint8), truncated))
    if not any(len(document.positions) for document in documents):
        raise InputRefused("the prompts hold no token to score", expected="texts of two tokens or more")
    return documents


def tokens_sha256(documents: Sequence[Document]) -> str:
    """A digest of every token and scope: two figures may be compared only where it is equal."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(np.array([len(document.tokens), *document.tokens], "<i8").tobytes() + document.scope.tobytes())
    return digest.hexdigest()


def joined_inputs(rows: Sequence[Row], template: str | None, special_tokens: Mapping[str, str]) -> list[Row]:
    """The rows, with each input joined to its instruction where the template has no place for one."""
    if template is None or not any(row.input for row in rows):
        return list(rows)
    if takes_input(template, special_tokens=special_tokens, today=TODAY):
        return list(rows)
    return [
        replace(row, instruction=f"{row.instruction}\n\n{row.input}", input="") if row.input else row for row in rows
    ]


def plain_prompt(instruction: str, input: str) -> str:
    """Instruction and input without a template: what is fed where the model names none."""
    return f"{instruction}\n\n{input}\n" if input else f"{instruction}\n\n"


def _row(path: Path, number: int, line: str) -> Row:
    try:
        value = parse_json(line.encode())
    except ValueError as error:
        raise InputRefused(
            f"{path}, line {number}, is not JSON ({error})", expected="one JSON object a line"
        ) from error
    fields = ("instruction", "input", "output", "text")
    if not isinstance(value, dict) or not all(isinstance(value.get(key, ""), str) for key in fields):
        raise InputRefused(f"{path}, line {number}, is not an object of texts", expected="strings")
    row = Row(*(value.get(key, "") for key in fields))
    if bool(row.text) == bool(row.instruction):
        raise InputRefused(
            f"{path}, line {number}, has the keys {sorted(value)}",
            expected='{"instruction", "input", "output"} or {"text"}, not empty',
        )
    return row


def _tokenize_text(row: Row, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    ids = tokenizer.encode(row.text).ids
    return ids, [TEXT] * len(ids)


def _tokenize_pair(row: Row, tokenizer: Tokenizer, render: "_Renderer") -> tuple[list[int], list[int]]:
    prompt, spans = render.prompt(row)
    encoded = tokenizer.encode(prompt, add_special_tokens=render.template is None)
    scope = [
        PROMPT if any(start < last and end > first for first, last in spans) else FED for start, end in encoded.offsets
    ]
    # The answer is tokenized apart, as in training: a token never crosses from the prompt into the answer.
    answer = tokenizer.encode(row.output, add_special_tokens=False).ids
    return [*encoded.ids, *answer], [*scope, *[RESPONSE] * len(answer)]


@dataclass(frozen=True, slots=True)
class _Renderer:
    template: str | None
    special_tokens: Mapping[str, str]

    def prompt(self, row: Row) -> tuple[str, list[tuple[int, int]]]:
        """The prompt, and where in it instruction and input stand."""
        if self.template is None:
            prompt = plain_prompt(row.instruction, row.input)
            return prompt, [(0, len(prompt))]
        prompt = self._text(self.template, row.instruction, row.input)
        pieces = self._text(self.template, SENTINEL, SENTINEL if row.input else "").split(SENTINEL)
        if len(pieces) == 3 and row.input:
            start = len(pieces[0])
            spans = [(start, start + len(row.instruction))]
            start += len(row.instruction) + len(pieces[1])
            spans.append((start, start + len(row.input)))
        else:
            spans = [(len(pieces[0]), len(prompt) - len(pieces[-1]))]
        return prompt, spans

    def _text(self, template: str, instruction: str, input: str) -> str:
        return render_instruction(template, instruction, input, special_tokens=self.special_tokens, today=TODAY)


def _limit_response(tokens: list[int], scope: list[int], limit: int) -> tuple[list[int], list[int]]:
    responses = [i for i, kind in enumerate(scope) if kind == RESPONSE]
    stop = responses[limit] if len(responses) > limit else len(tokens)
    return tokens[:stop], scope[:stop]
