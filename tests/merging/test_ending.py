"""A merge says so where the adapter was trained to end its answers otherwise than the base."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from exporter import merge
from exporter.merging.ending import unlisted_end
from tests.notes import Notes
from tests.pairs import Pair, edit_json


def trained_tokenizer(pair: Pair, end: str) -> PreTrainedTokenizerBase:
    """The base's tokenizer with another end of text, saved beside the adapter as trainers do."""
    tokenizer: Any = AutoTokenizer.from_pretrained(pair.base)
    tokenizer.add_special_tokens({"eos_token": end})
    tokenizer.save_pretrained(pair.adapter)
    return tokenizer


def said(pair: Pair, out: Path) -> list[str]:
    notes = Notes()
    merge(base=pair.base, adapter=pair.adapter, out=out, progress=notes)
    return [note for note in notes.said if "ends an answer" in note]


@pytest.mark.parametrize("end", ["<|im_end|>", " the"])  # a token of the adapter's own, and one of the vocabulary
def test_an_end_that_the_base_does_not_list_is_named(pair: Pair, tmp_path: Path, end: str) -> None:
    tokenizer = trained_tokenizer(pair, end)
    (note,) = said(pair, tmp_path / "out")
    assert all(part in note for part in (repr(end), f"({tokenizer.eos_token_id})", "generation_config.json"))


def test_the_first_token_of_all_is_an_end_too(pair: Pair, tmp_path: Path) -> None:
    """0 ends the answers of a Pythia: it is listed, not missing."""
    edit_json(pair.base / "generation_config.json", eos_token_id=0)
    (note,) = said(pair, tmp_path / "out")
    assert "eos_token_id [0]" in note


def test_nothing_is_said_where_they_agree(pair: Pair, tmp_path: Path) -> None:
    assert said(pair, tmp_path / "own") == []
    tokenizer = trained_tokenizer(pair, "<|im_end|>")
    edit_json(pair.base / "generation_config.json", eos_token_id=[0, tokenizer.eos_token_id])
    assert said(pair, tmp_path / "listed") == []


@pytest.mark.parametrize(
    "config",
    [b"{", b"[]", b'{"eos_token_id": {"a": 1}}', b'{"eos_token_id": "x"}', b'{"eos_token_id": [[]]}'],
)
def test_what_cannot_be_read_says_nothing_here(pair: Pair, config: bytes) -> None:
    files = {"generation_config.json": config, "tokenizer.json": (pair.base / "tokenizer.json").read_bytes()}
    assert unlisted_end(pair.base, files, {}) is None
    for tokenizer in (
        b"[]",
        b'{"added_tokens": [[]]}',
        b'{"added_tokens": [{"content": [], "id": 1}]}',
        b'{"model": 3}',
    ):
        assert unlisted_end(pair.base, files | {"tokenizer.json": tokenizer}, {}) is None
