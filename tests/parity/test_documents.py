"""Documents: which token is fed, prompt, response or text; what is cut; which rows are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from exporter.errors import InputRefused
from exporter.parity import inputs
from exporter.parity.documents import (
    LEVELS,
    PACKAGED,
    Document,
    Row,
    build_documents,
    joined_inputs,
    level_rows,
    read_rows,
    tokens_sha256,
)
from exporter.prompts import ALPACA, render_instruction
from exporter.runtime import text
from tests.parity.conftest import write_tokenizer

ROW = Row("Name three fruits.", "Below is an apple. ### Input:", "Apples, pears and plums.")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def build(rows: list[Row], tokenizer: Tokenizer, *, template: str | None = ALPACA, context: int = 512, limit: int = 64):
    return build_documents(rows, tokenizer, template=template, end_of_text=0, context=context, response_tokens=limit)


def text_of(document: Document, tokenizer: Tokenizer, scope: int) -> str:
    chosen = [t for t, s in zip(document.tokens, document.scope, strict=True) if s == scope]
    return tokenizer.decode(chosen, skip_special_tokens=False)


def test_the_template_is_fed_and_not_scored(tokenizer: Tokenizer) -> None:
    (document,) = build([ROW], tokenizer)
    whole = tokenizer.decode(list(document.tokens), skip_special_tokens=False)
    assert whole == render_instruction(ALPACA, ROW.instruction, ROW.input) + ROW.output + "<|endoftext|>"
    assert text_of(document, tokenizer, 2) == ROW.output + "<|endoftext|>"
    scored = text_of(document, tokenizer, 1)
    assert "Name three fruits." in scored
    assert "Below is an apple." in scored  # words of the template inside an input are the input's
    fed = text_of(document, tokenizer, 0)
    assert "Write a response" in fed
    assert "Name" not in fed


def test_positions_predict_their_targets(tokenizer: Tokenizer) -> None:
    (document,) = build([ROW], tokenizer)
    assert (np.array(document.tokens)[document.positions + 1] == document.targets).all()
    assert set(document.target_scopes) == {"prompt", "response"}
    assert document.targets[-1] == 0  # end of text is scored


def test_without_a_template_everything_but_the_first_token_is_scored(tokenizer: Tokenizer) -> None:
    (document,) = build([ROW], tokenizer, template=None)
    assert len(document.positions) == len(document.tokens) - 1
    assert tokenizer.decode(list(document.tokens)).startswith("Name three fruits.\n\nBelow is an apple.")


def test_a_response_is_limited_and_a_long_document_cut_and_marked(tokenizer: Tokenizer) -> None:
    (short,) = build([ROW], tokenizer, limit=5)
    assert (short.scope == 2).sum() == 5
    assert not short.truncated
    (whole,) = build([ROW], tokenizer)
    length = len(whole.tokens) - 3
    (cut,) = build([ROW], tokenizer, context=length)
    assert cut.tokens == whole.tokens[:length]
    assert cut.truncated
    with pytest.raises(InputRefused, match="no token to score"):
        build([ROW], tokenizer, context=5)


def test_one_token_texts_are_scored_by_their_end(tokenizer: Tokenizer) -> None:
    (document,) = build([Row(text="!")], tokenizer)
    assert document.targets.tolist() == [0]
    assert document.target_scopes.tolist() == ["text"]


def test_levels_grow_and_commit_uses_the_odd_rows_first() -> None:
    rows = [Row(str(i), "", "x") for i in range(100)]
    commit = level_rows(rows, "commit", packaged=True)
    assert [row.instruction for row in commit[:3]] == ["1", "3", "5"]
    assert len(commit) == LEVELS["commit"].documents == 32
    assert len(level_rows(rows, "nightly", packaged=True)) == 100
    release = level_rows(rows, "release", packaged=True)
    assert {"text"} == {"text" if row.text else "" for row in release[100:]}
    assert len(level_rows(rows, "release", packaged=False)) == 100


def test_the_packaged_sets_are_whole() -> None:
    assert len(read_rows(PACKAGED / "alpaca.jsonl")) == 120
    kinds = {json.loads(line)["kind"] for line in (PACKAGED / "texts.jsonl").read_text().splitlines()}
    assert kinds == {"general", "code", "long", "unicode", "edge"}


def test_the_digest_sees_a_token_and_a_scope(tokenizer: Tokenizer) -> None:
    one = build([ROW], tokenizer)
    other = build([Row(ROW.instruction, ROW.input, ROW.output + "!")], tokenizer)
    plain = build([ROW], tokenizer, template=None)
    assert len({tokens_sha256(documents) for documents in (one, other, plain)}) == 3
    assert tokens_sha256(one) == tokens_sha256(build([ROW], tokenizer))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no prompts"),
        ("{not json}\n", "line 1"),
        ('{"instruction": "a"}\n[1]\n', "line 2"),
        ('{"instruction": 3}\n', "line 1"),
        ('{"prompt": "a"}\n', "prompt"),
        ('{"text": "a", "instruction": "b"}\n', "line 1"),
    ],
)
def test_bad_rows_are_refused_with_their_line(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(InputRefused, match=said):
        read_rows(path)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="no prompts file"):
        read_rows(tmp_path / "none.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputRefused, match="UTF-8"):
        read_rows(tmp_path / "binary.jsonl")


CHATML = "{% for m in messages %}{{ bos_token }}<|user|>{{ m.content + eos_token }}{% endfor %}<|assistant|>"


def test_a_template_finds_the_special_tokens(tokenizer: Tokenizer) -> None:
    """Without them `content + eos_token` is refused, and `bos_token` alone is silently nothing."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    row = Row("Hi", output="Yes")
    options = {"template": CHATML, "end_of_text": None, "context": 64, "response_tokens": None}
    (document,) = build_documents([row], tokenizer, special_tokens=names, **options)
    assert tokenizer.decode(list(document.tokens)) == "<s><|user|>Hi</s><|assistant|>Yes"
    with pytest.raises(InputRefused, match="eos_token"):
        build_documents([row], tokenizer, **options)


def test_an_input_goes_behind_its_instruction_where_the_template_has_no_place_for_it() -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    rows = [ROW, Row("Hi", output="Yes"), Row(text="free")]
    joined = joined_inputs(rows, CHATML, names)
    assert joined[0].instruction == f"{ROW.instruction}\n\n{ROW.input}"
    assert joined[0].input == ""
    assert joined[1:] == rows[1:]
    assert joined_inputs(rows, ALPACA, {}) == joined_inputs(rows, None, {}) == rows


def test_a_template_with_a_date_gives_the_same_tokens_every_day(tokenizer: Tokenizer) -> None:
    template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    (document,) = build([Row("Hi", output="Yes")], tokenizer, template=template)
    assert tokenizer.decode(list(document.tokens)).startswith("26 Jul 2024: Hi")


def test_a_template_with_a_clock_is_asked_for_its_place_at_a_fixed_time() -> None:
    """Two renderings differ by the time that passes between them: that is no place for an input."""
    template = "{{ strftime_now('%S.%f') }} {{ messages[0].content }}"
    assert joined_inputs([ROW], template, {})[0].input == ""


def test_a_tokenizer_neither_cuts_nor_pads(tmp_path: Path) -> None:
    """transformers saves what a training run set."""
    write_tokenizer(tmp_path)
    saved = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.enable_padding(length=64)
    saved.enable_truncation(3)
    saved.save(str(tmp_path / "tokenizer.json"))
    for load in (inputs.load_tokenizer, text.load_tokenizer):
        found = load(tmp_path).encode("Name three fruits.").ids
        assert 3 < len(found) < 64
