"""/v1/chat/completions through OpenAI's own client: the bundle's template, its options, and their logprobs."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import BadRequestError, OpenAI
from scipy.special import log_softmax
from transformers import AutoTokenizer

from exporter.runtime.generate import generate
from exporter.runtime.load import load
from exporter.runtime.runner import Runner
from exporter.runtime.text import load_tokenizer
from exporter.serving.vocabulary import Vocabulary
from tests.pairs import HELLO, LOW, fallback_tokenizer
from tests.serving.running import Running

QUESTION = [{"role": "user", "content": "Name three colours."}]


@pytest.fixture(scope="module")
def runner(demo: Path) -> Runner:
    return load(demo, threads=1)


def test_a_question_is_answered_as_generate_answers_an_instruction(client: OpenAI, runner: Runner) -> None:
    expected = generate(runner, instruction="Name three colours.", max_new_tokens=20)
    for limit in ("max_tokens", "max_completion_tokens"):
        made = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, **{limit: 20})  # pyright: ignore
        assert made.choices[0].message.content == expected.text
        assert made.choices[0].message.role == "assistant"
        assert made.usage is not None
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (expected.prompt_tokens, expected.new_tokens)
        assert (made.object, made.id[:9]) == ("chat.completion", "chatcmpl-")


def test_without_a_limit_an_answer_may_fill_the_context(client: OpenAI, runner: Runner) -> None:
    expected = generate(runner, instruction="Name three colours.", max_new_tokens=10_000)
    made = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)  # pyright: ignore
    assert made.choices[0].message.content == expected.text
    assert made.choices[0].finish_reason == expected.reason


def test_an_input_goes_where_the_template_has_it(client: OpenAI, runner: Runner) -> None:
    messages = [{"role": "user", "content": "Summarize.", "input": "A long day at sea."}]
    made = client.chat.completions.create(model="demo", messages=messages, max_tokens=16, temperature=0)  # pyright: ignore
    expected = generate(runner, instruction="Summarize.", input="A long day at sea.", max_new_tokens=16)
    assert made.choices[0].message.content == expected.text


def test_turns_and_parts_render_as_transformers_renders_them(server: Running, demo: Path) -> None:
    turns = [*QUESTION, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Another one.\nPlease."}]
    parts = [{"type": "text", "text": "Another one."}, {"type": "text", "text": "Please."}]
    in_parts = [*turns[:2], {"role": "user", "content": parts}]
    found = server.post("/v1/chat/render", {"model": "demo", "messages": in_parts}).json()
    tokenizer = AutoTokenizer.from_pretrained(demo)
    assert found["prompt"] == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert found["prompt_tokens"] == len(tokenizer(found["prompt"])["input_ids"])
    assert found["template"] == (demo / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be kind."}, *QUESTION],
        [*QUESTION, *QUESTION],
        [*QUESTION, {"role": "assistant", "content": "Red."}],
    ],
)
def test_what_the_template_refuses_is_refused(client: OpenAI, messages: list) -> None:
    with pytest.raises(BadRequestError, match="user") as refused:
        client.chat.completions.create(model="demo", messages=messages)
    assert (refused.value.code, refused.value.param) == ("template_refuses", "messages")


def test_a_template_is_never_invented(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="no chat template") as refused:
        client.chat.completions.create(model="tiny", messages=QUESTION)  # pyright: ignore
    assert refused.value.code == "no_chat_template"


def test_logprobs_with_bytes(client: OpenAI, runner: Runner) -> None:
    made = client.chat.completions.create(
        model="demo",
        messages=QUESTION,  # pyright: ignore
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    assert made.choices[0].logprobs is not None
    found = made.choices[0].logprobs.content
    assert found is not None
    raw = b"".join(bytes(token.bytes or []) for token in found)
    assert raw.decode() == made.choices[0].message.content
    vocabulary = Vocabulary(load_tokenizer(runner.bundle.directory))
    prompt = vocabulary.encode(str(made.choices[0].message.content) and _prompt(runner), add_special_tokens=False)
    cache = runner.new_cache(1)
    logits = runner.prefill(cache, 0, prompt)
    for token in found:
        expected = log_softmax(logits.astype(np.float64))
        best = np.argsort(-expected)[:3]
        assert [bytes(top.bytes or []) for top in token.top_logprobs] == [vocabulary.token_bytes(int(i)) for i in best]
        np.testing.assert_allclose([top.logprob for top in token.top_logprobs], expected[best], atol=1e-4)
        assert token.logprob == token.top_logprobs[0].logprob  # greedy
        logits = runner.decode(cache, [int(best[0])])[0]


def _prompt(runner: Runner) -> str:
    tokenizer = AutoTokenizer.from_pretrained(runner.bundle.directory)
    return tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.9, "seed": 2, "n": 3},
        {"temperature": 1.9, "seed": 5, "logprobs": True, "top_logprobs": 2},
        {"temperature": 0, "stop": " and"},
    ],
)
def test_a_stream_says_what_the_whole_says(client: OpenAI, options: dict) -> None:
    settings = {"model": "demo", "messages": QUESTION, "max_tokens": 16} | options
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason] == [own[-1].finish_reason]
        if choice.logprobs is not None:
            entries = [entry for c in own if c.logprobs is not None for entry in c.logprobs.content or []]
            assert entries == choice.logprobs.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_a_texts_tokens_have_the_texts_bytes(demo: Path, text: str) -> None:
    vocabulary = _vocabulary(demo)
    ids = vocabulary.encode(text)
    assert b"".join(map(vocabulary.token_bytes, ids)) == text.encode()
    offsets = vocabulary.offsets(ids)
    assert offsets == sorted(offsets)
    assert all(offset <= len(text) for offset in offsets)


def test_a_prompt_of_broken_bytes_has_its_places_too() -> None:
    vocabulary = Vocabulary(fallback_tokenizer())
    assert vocabulary.offsets([HELLO, 0xE6, 0x97, 0xA5, 0xF0, HELLO, LOW]) == [0, 5, 5, 5, 6, 6, 13]


_vocabularies: dict[Path, Vocabulary] = {}


def _vocabulary(directory: Path) -> Vocabulary:
    if directory not in _vocabularies:
        _vocabularies[directory] = Vocabulary(load_tokenizer(directory))
    return _vocabularies[directory]
