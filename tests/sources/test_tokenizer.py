"""Which tokenizer a merged model gets, and the tokenizer.json that old files lack."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import GPT2TokenizerFast

from exporter.errors import InputRefused
from exporter.sources.tokenizer import build_tokenizer_json, tokenizer_files

TEXTS = [
    "Hello world",
    " low lower  lowest\n\n",
    "a<|endoftext|>b",
    "<|endoftext|>",
    "schön 漢字 🙂",
    "!",
    "",
    "tab\tx",
]


def put(directory: Path, *names: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).write_bytes(f"{directory.name}/{name}".encode())
    return directory


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """GPT-2's tokenizer in its old form, with few merges: vocab.json and merges.txt only."""
    directory = tmp_path / "gpt2"
    directory.mkdir()
    merges = ["l o", "lo w", "e r", "Ġ low", "Ġlow er", "H e", "l l"]
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return directory


def test_a_complete_adapter_wins(tmp_path: Path) -> None:
    base = put(tmp_path / "base", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    adapter = put(tmp_path / "adapter", "vocab.json", "merges.txt", "added_tokens.json", "adapter_config.json")
    chosen = tokenizer_files(base, [adapter])
    assert chosen.origin == "adapter"
    assert {file.name for file in chosen.files} == {"vocab.json", "merges.txt", "added_tokens.json"}
    assert {file.parent for file in chosen.files} == {adapter}
    assert not chosen.has_fast


def test_an_incomplete_adapter_is_not_mixed_in(tmp_path: Path) -> None:
    base = put(tmp_path / "base", "tokenizer.json", "tokenizer_config.json", "merges.txt")
    adapter = put(tmp_path / "adapter", "tokenizer_config.json", "special_tokens_map.json", "vocab.json")
    chosen = tokenizer_files(base, [adapter])
    assert chosen.origin == "base"
    assert {file.name for file in chosen.files} == {"tokenizer.json", "tokenizer_config.json"}
    assert chosen.has_fast


def test_the_first_complete_adapter_of_several(tmp_path: Path) -> None:
    base = put(tmp_path / "base", "tokenizer.json")
    first, second = put(tmp_path / "first", "tokenizer_config.json"), put(tmp_path / "second", "tokenizer.model")
    assert tokenizer_files(base, [first, second]).directory == second


def test_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="no tokenizer in"):
        tokenizer_files(put(tmp_path / "base", "vocab.json"), [put(tmp_path / "adapter", "tokenizer_config.json")])


@pytest.mark.parametrize("prefix_space", [False, True])
def test_the_built_file_gives_transformers_tokens(gpt2: Path, prefix_space: bool) -> None:
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": prefix_space}
    (gpt2 / "tokenizer_config.json").write_text(json.dumps(config))
    before = sorted(gpt2.iterdir())
    built = Tokenizer.from_str(build_tokenizer_json(gpt2).decode())
    oracle = GPT2TokenizerFast.from_pretrained(gpt2)
    for text in TEXTS:
        assert built.encode(text).ids == oracle(text)["input_ids"]
        assert built.decode(built.encode(text).ids, skip_special_tokens=False) == oracle.decode(
            oracle(text)["input_ids"], clean_up_tokenization_spaces=False
        )
    end = oracle.convert_tokens_to_ids("<|endoftext|>")
    assert built.encode("a<|endoftext|>").ids[-1] == end
    assert sorted(gpt2.iterdir()) == before


def test_the_built_file_merges(gpt2: Path) -> None:
    built = Tokenizer.from_str(build_tokenizer_json(gpt2).decode())
    assert built.encode("low lower").tokens == ["low", "Ġlower"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vocab.json", b"{"),
        ("vocab.json", b"[]"),
        ("vocab.json", b'{"a": 0}'),
        ("merges.txt", b"#version: 0.2\nnot there\n"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b'{"tokenizer_class": "LlamaTokenizer"}'),
    ],
)
def test_malformed_files_are_refused(gpt2: Path, name: str, content: bytes) -> None:
    (gpt2 / name).write_bytes(content)
    with pytest.raises(InputRefused):
        build_tokenizer_json(gpt2)


def test_code_that_the_files_name_is_not_run(gpt2: Path) -> None:
    config = {"tokenizer_class": "GPT2Tokenizer", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (gpt2 / "tokenizer_config.json").write_text(json.dumps(config))
    (gpt2 / "evil.py").write_text(f"open({str(gpt2 / 'ran')!r}, 'w')\nclass Evil: pass\n")
    build_tokenizer_json(gpt2)
    assert not (gpt2 / "ran").exists()
