"""/v1/completions through OpenAI's own client: every option, against `exporter generate` and the Runner's logits."""

from pathlib import Path

import numpy as np
import pytest
from openai import OpenAI
from scipy.special import log_softmax

from exporter.runtime.generate import generate
from exporter.runtime.load import load
from exporter.runtime.runner import Runner
from exporter.runtime.sampling import Sampling
from exporter.runtime.text import load_tokenizer
from exporter.serving.vocabulary import Vocabulary

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def runner(demo: Path) -> Runner:
    return load(demo, threads=1)


@pytest.fixture(scope="module")
def vocabulary(demo: Path) -> Vocabulary:
    return Vocabulary(load_tokenizer(demo))


def test_greedy_text_and_usage_are_those_of_generate(client: OpenAI, runner: Runner) -> None:
    expected = generate(runner, prompt=PROMPT, max_new_tokens=24)
    made = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0)
    assert made.choices[0].text == expected.text
    assert made.choices[0].finish_reason == expected.reason == "length"
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (expected.prompt_tokens, expected.new_tokens)
    assert made.usage.total_tokens == expected.prompt_tokens + 24
    assert (made.object, made.model, made.id[:5]) == ("text_completion", "demo", "cmpl-")


def test_sixteen_tokens_where_nothing_is_said(client: OpenAI) -> None:
    made = client.completions.create(model="demo", prompt=PROMPT, temperature=0, extra_body={"ignore_eos": True})
    assert made.usage is not None
    assert made.usage.completion_tokens == 16


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.3, "seed": 7},
        {"temperature": 0.8, "top_p": 0.7, "seed": 8},
        {"temperature": 1.0, "seed": 9, "extra_body": {"top_k": 3}},
        {"temperature": 0, "extra_body": {"repetition_penalty": 1.5}},
        {"temperature": 0, "stop": ["have", "zzz"]},
        {"seed": 10},  # OpenAI's default temperature is 1
    ],
)
def test_an_option_means_what_it_means_to_generate(client: OpenAI, runner: Runner, options: dict) -> None:
    made = client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, **options)
    own = {"temperature": 1.0} | options | options.get("extra_body", {})
    own.pop("extra_body", None)
    expected = generate(runner, prompt=PROMPT, max_new_tokens=20, **own)
    assert made.choices[0].text == expected.text
    assert made.choices[0].finish_reason == ("length" if expected.reason == "length" else "stop")


def test_presence_and_frequency_penalties_lower_the_logits_of_seen_tokens(client: OpenAI, runner: Runner) -> None:
    """OpenAI's formula: logit - frequency * count - presence * (count > 0), over the tokens generated so far."""
    tokenizer = load_tokenizer(runner.bundle.directory)
    ids = tokenizer.encode(PROMPT).ids
    start, counts = len(ids), np.zeros(runner.vocab_size)
    for _ in range(24):
        logits = runner.logits(ids)[-1] - 1.2 * counts - 0.8 * (counts > 0)
        ids.append(int(logits.argmax()))
        counts[ids[-1]] += 1
    made, plain = (
        client.completions.create(
            model="demo",
            prompt=PROMPT,
            max_tokens=24,
            temperature=0,
            frequency_penalty=frequency,
            presence_penalty=presence,
            extra_body={"ignore_eos": True},
        )
        for frequency, presence in ((1.2, 0.8), (0.0, 0.0))
    )
    assert made.choices[0].text == tokenizer.decode(ids[start:]) != plain.choices[0].text


def test_the_same_seed_gives_the_same_text_and_no_seed_another(client: OpenAI) -> None:
    def texts(seed: int | None = None) -> set[str]:
        return {
            client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, seed=seed).choices[0].text
            for _ in range(3)
        }

    assert len(texts(seed=-5)) == 1
    assert len(texts()) > 1


def test_n_choices_of_several_prompts(client: OpenAI, runner: Runner) -> None:
    prompts = ["Once upon", "The weather"]
    made = client.completions.create(model="demo", prompt=prompts, n=3, max_tokens=6, seed=1)
    assert [choice.index for choice in made.choices] == list(range(6))
    assert len({choice.text for choice in made.choices[:3]}) > 1
    assert made.choices[0].text == generate(runner, prompt=prompts[0], max_new_tokens=6, temperature=1.0, seed=1).text
    assert made.usage is not None
    tokenizer = load_tokenizer(runner.bundle.directory)
    assert made.usage.prompt_tokens == sum(len(tokenizer.encode(prompt).ids) for prompt in prompts)


def test_prompts_as_tokens(client: OpenAI, runner: Runner) -> None:
    tokenizer = load_tokenizer(runner.bundle.directory)
    rows = [tokenizer.encode(text).ids for text in (PROMPT, "The weather")]
    texts = [generate(runner, prompt=text, max_new_tokens=6).text for text in (PROMPT, "The weather")]
    one = client.completions.create(model="demo", prompt=rows[0], max_tokens=6, temperature=0)
    both = client.completions.create(model="demo", prompt=rows, max_tokens=6, temperature=0)
    assert [one.choices[0].text] == texts[:1]
    assert [choice.text for choice in both.choices] == texts


def test_logprobs_are_the_log_softmax_of_the_runners_logits(
    client: OpenAI, runner: Runner, vocabulary: Vocabulary
) -> None:
    made = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=4, echo=True, extra_body={"ignore_eos": True}
    )
    found = made.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    ids = list(vocabulary.encode(PROMPT))
    rows, cache = [*runner.logits(ids)], runner.new_cache(1)  # row i predicts token i + 1
    runner.prefill(cache, 0, ids)
    for _ in range(8):  # as the answer is made: in 8 bits a token alone and in a chunk differ in the second digit
        ids.append(int(rows[-1].argmax()))
        rows.append(runner.decode(cache, ids[-1:])[0])
    expected = log_softmax(np.array(rows, np.float64), axis=-1)
    assert (
        "".join(found.tokens)
        == made.choices[0].text
        == PROMPT + load_tokenizer(runner.bundle.directory).decode(ids[-8:])
    )
    assert found.token_logprobs[0] is None
    own = [expected[i, token] for i, token in enumerate(ids[1:])]
    np.testing.assert_allclose(np.array(found.token_logprobs[1:], float), own, atol=1e-4)
    for row, top, token in zip(expected, found.top_logprobs[1:], ids[1:], strict=False):
        best = {vocabulary.token_bytes(int(i)).decode(): row[i] for i in np.argsort(-row)[:4]} | {
            vocabulary.token_bytes(token).decode(): row[token]
        }
        assert top.keys() == best.keys()
        np.testing.assert_allclose([top[key] for key in best], list(best.values()), atol=1e-4)
    starts = np.cumsum([0, *map(len, found.tokens)])[:-1]
    assert found.text_offset == starts.tolist()


def test_a_prompt_alone_can_be_scored(client: OpenAI, runner: Runner, vocabulary: Vocabulary) -> None:
    made = client.completions.create(model="demo", prompt=PROMPT, max_tokens=0, logprobs=0, echo=True)
    ids = vocabulary.encode(PROMPT)
    expected = log_softmax(runner.logits(ids).astype(np.float64), axis=-1)
    assert made.choices[0].text == PROMPT
    assert made.choices[0].logprobs is not None
    assert made.choices[0].logprobs.token_logprobs is not None
    own = [expected[i, token] for i, token in enumerate(ids[1:])]
    np.testing.assert_allclose(made.choices[0].logprobs.token_logprobs[1:], own, atol=1e-4)
    assert made.usage is not None
    assert made.usage.completion_tokens == 0


@pytest.mark.parametrize(
    "options",
    [
        {"model": "demo", "temperature": 1.9, "seed": 3, "logprobs": 2},
        {"model": "demo", "temperature": 0, "stop": ["have to share", "never seen"], "logprobs": 1},
        {"model": "demo", "temperature": 0.9, "seed": 1, "n": 3, "echo": True, "logprobs": 1},
        {"model": "demo", "temperature": 0, "prompt": ["One", "Two ✂"], "echo": True},
        {"model": "tiny", "temperature": 1.5, "seed": 4, "logprobs": 3, "echo": True},
    ],
)
def test_a_stream_says_what_the_whole_says(client: OpenAI, options: dict) -> None:
    settings = {"prompt": PROMPT, "max_tokens": 20} | options
    whole = client.completions.create(**settings)
    chunks = list(client.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        assert [c.finish_reason for c in own if c.finish_reason] == [choice.finish_reason]
        if choice.logprobs is not None:
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                parts = [getattr(c.logprobs, name) for c in own if c.logprobs is not None]
                assert [entry for part in parts for entry in part] == getattr(choice.logprobs, name)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stop_string_across_tokens_never_leaks(client: OpenAI, runner: Runner) -> None:
    """Every stop of three characters that occurs in the answer, most of them across two tokens."""
    text = generate(runner, prompt=PROMPT, max_new_tokens=12).text
    for at in range(0, len(text) - 3, 3):
        stop = text[at : at + 3]
        settings = {"model": "demo", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stop": stop}
        expected = text[: text.index(stop)]
        whole = client.completions.create(**settings, logprobs=0)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (expected, "stop")
        pieces = [chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True)]
        assert "".join(pieces) == expected
        # Tokens are those that the text begins with; the last one may reach into the stop string.
        assert whole.choices[0].logprobs is not None
        assert whole.choices[0].logprobs.tokens is not None
        assert "".join(whole.choices[0].logprobs.tokens).startswith(expected)
        assert all(offset < len(expected) for offset in whole.choices[0].logprobs.text_offset or ())


def test_a_stream_never_splits_a_character(client: OpenAI, tiny: Path) -> None:
    """A random model over bytes writes mostly broken UTF-8: its pieces join to what the tokenizer decodes."""
    runner, tokenizer = load(tiny, threads=1), load_tokenizer(tiny)
    text = "é✂😀"
    sampling = Sampling(temperature=1.5, seed=11)
    ids = runner.generate([tokenizer.encode(text).ids], 40, sampling, stop_tokens=())[0]
    chunks = client.completions.create(
        model="tiny",
        prompt=text,
        max_tokens=40,
        temperature=1.5,
        seed=11,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == tokenizer.decode(ids)


def test_a_repeated_prompt_is_taken_from_the_cache(client: OpenAI) -> None:
    prompt = "A prompt that no other test in this file has, long enough to be worth a cache: " * 3
    first, second = (
        client.completions.create(model="demo", prompt=prompt, max_tokens=4, temperature=0) for _ in range(2)
    )
    assert first.choices[0].text == second.choices[0].text
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    assert 0 < (second.usage.prompt_tokens_details.cached_tokens or 0) < second.usage.prompt_tokens


def test_an_adapter_is_a_model_of_its_own(client: OpenAI, separate: Path) -> None:
    base = load(separate, threads=1)
    expected = {
        "base": generate(base, prompt=PROMPT, max_new_tokens=16).text,
        "poet": generate(base, prompt=PROMPT, max_new_tokens=16, adapter="poet").text,
    }
    assert expected["base"] != expected["poet"]
    streams = {
        name: client.completions.create(model=name, prompt=PROMPT, max_tokens=16, temperature=0, stream=True)
        for name in expected
    }
    texts = {name: "".join(chunk.choices[0].text for chunk in stream) for name, stream in streams.items()}
    assert texts == expected


def test_models_are_listed_by_name(client: OpenAI) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert list(models) == ["demo", "base", "poet", "tiny"]
    assert client.models.retrieve("poet").model_dump() == models["poet"]
    assert models["demo"] | {"precision": "int8", "chat": True, "max_model_len": 512} == models["demo"]
    assert models["poet"] | {"adapter": "poet", "chat": False} == models["poet"]
