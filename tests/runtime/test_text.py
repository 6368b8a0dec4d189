"""Streamed text equals the decoded whole; characters and stop strings are never split."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from exporter.errors import InputRefused, UsageError
from exporter.graph.export import export
from exporter.prompts import ALPACA, render_instruction
from exporter.runtime.generate import generate, prompt_ids
from exporter.runtime.load import load
from exporter.runtime.text import TextStream, load_tokenizer
from tests.graph.conftest import save_byte_tokenizer, tiny_model
from tests.pairs import HELLO, LOW, fallback_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    tiny_model(directory, n_positions=512)
    save_byte_tokenizer(directory)
    export(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory)


@given(text=st.text(max_size=30))
def test_pieces_join_to_the_text_and_are_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text, add_special_tokens=False).ids]
    assert "\ufffd" not in "".join(pieces).replace("\ufffd" if "\ufffd" in text else "", "")
    assert "".join(pieces) + stream.finish() == text


@given(data=st.lists(st.integers(0, 255), max_size=12))
def test_bytes_that_are_no_character_come_as_decode_gives_them(tokenizer: Tokenizer, data: list[int]) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in data]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(data)


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    return fallback_tokenizer()


def test_the_text_goes_on_after_a_cut_off_character(fallback: Tokenizer) -> None:
    stream = TextStream(fallback)
    pieces = [stream.push(token) for token in (HELLO, 0xE6, 0x97, 0xA5, 0xF0, 0x9F, HELLO, HELLO, 0xF0, 0x9F)]
    assert pieces == ["Hello", "", "", "日", "", "", "\ufffd\ufffd Hello", " Hello", "", ""]
    assert stream.finish() == "\ufffd\ufffd"


@given(words=st.lists(st.sampled_from([HELLO, LOW]) | st.text(max_size=3) | st.binary(max_size=3), max_size=8))
def test_bytes_beside_words_come_as_characters_and_as_replacements_where_they_are_none(
    fallback: Tokenizer, words: list[int | str | bytes]
) -> None:
    ids: list[int] = []
    for word in words:
        ids += [word] if isinstance(word, int) else word.encode() if isinstance(word, str) else word
    stream = TextStream(fallback)
    pieces = [stream.push(token) for token in ids]
    text, whole = "".join(pieces) + stream.finish(), fallback.decode(ids)
    if "\ufffd" in whole:
        assert text.count("Hello") >= ids.count(HELLO)
        assert text.endswith("\ufffd") == whole.endswith("\ufffd")
    else:
        assert text == whole


@given(text=st.text("abE#", max_size=20), stops=st.lists(st.text("abE#", min_size=1, max_size=4), max_size=3))
def test_nothing_from_the_first_stop_string_on_gets_out(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    stream, out = TextStream(tokenizer, stops), ""
    seen = ""
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        out += stream.push(token)
        seen += tokenizer.decode([token])
        if stream.stopped:
            break
    out += stream.finish()
    # a stop string counts as soon as it is complete
    ends = [seen.find(stop) for stop in stops if stop in seen]
    assert out == (seen[: min(ends)] if ends else text)
    assert stream.stopped == any(stop in text for stop in stops)


def test_a_special_token_that_is_named_ends_the_text(tokenizer: Tokenizer) -> None:
    (end,) = tokenizer.encode("<|endoftext|>", add_special_tokens=False).ids
    ids = [*tokenizer.encode("abE", add_special_tokens=False).ids, end, *tokenizer.encode("more").ids]
    for stops, expected in ((["<|endoftext|>", "Ex"], "abE"), (["Ex"], "abEmore")):
        stream = TextStream(tokenizer, stops)
        assert "".join([*map(stream.push, ids), stream.finish()]) == expected
        assert stream.stopped == (expected == "abE")


def test_generate_equals_the_decoded_tokens(directory: Path, tokenizer: Tokenizer) -> None:
    runner = load(directory, threads=1)
    ids = runner.generate([tokenizer.encode("Hi!").ids], 12)[0]
    pieces: list[str] = []
    made = generate(runner, prompt="Hi!", max_new_tokens=12, on_text=pieces.append)
    assert made.text == "".join(pieces) == tokenizer.decode(ids)
    assert (made.prompt_tokens, made.new_tokens, made.reason) == (3, 12, "length")
    stop = made.text[3:5]
    cut = generate(runner, prompt="Hi!", max_new_tokens=12, stop=[stop])
    assert cut.text == made.text[: made.text.index(stop)]
    assert (cut.reason, cut.new_tokens < 12) == ("stop string", True)
    assert cut.to_dict()["text"] == cut.text


def test_an_instruction_goes_through_the_bundles_template(directory: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputRefused, match="no chat template"):
        prompt_ids(directory, instruction="Say hi.")
    (directory / "chat_template.jinja").write_text(ALPACA)
    try:
        text = tokenizer.decode(prompt_ids(directory, instruction="Say hi.", input="Now!"))
        assert text == render_instruction(ALPACA, "Say hi.", "Now!")
        assert text.endswith("### Response:\n")
        assert generate(directory, instruction="Say hi.", max_new_tokens=4).new_tokens == 4
    finally:
        (directory / "chat_template.jinja").unlink()


def test_exactly_one_of_instruction_and_prompt(directory: Path) -> None:
    for instruction, prompt in ((None, None), ("a", "b")):
        with pytest.raises(UsageError):
            prompt_ids(directory, instruction=instruction, prompt=prompt)


def test_a_missing_or_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputRefused, match="malformed"):
        load_tokenizer(tmp_path)
