"""A Runner's logits and tokens are transformers', however the work is split, and it never computes a wrong position."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.errors import EnvironmentLacking, ParityFailed, UsageError
from exporter.graph.export import export
from exporter.runtime.load import load
from exporter.runtime.runner import Runner
from exporter.runtime.sampling import Sampling
from tests.graph.conftest import END, TinyModel, tiny_model, tokens

TOLERANCE = 1e-4
POSITIONS = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    model = tiny_model(tmp_path_factory.mktemp("runner"), torch.float16, n_positions=POSITIONS)
    export(model.directory)
    return model


@pytest.fixture(scope="module")
def runner(model: TinyModel) -> Runner:
    return load(model.directory, threads=1)


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_logits_equal_transformers_at_every_position(model: TinyModel, runner: Runner, chunk: int) -> None:
    ids = tokens(POSITIONS)
    logits = runner.logits(ids, chunk=chunk)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, model.logits(ids), atol=TOLERANCE, rtol=0)


def test_rows_of_unequal_length_decode_together(model: TinyModel, runner: Runner) -> None:
    rows = [tokens(n, seed=n) for n in (17, 1, 6)]
    cache = runner.new_cache(3, capacity=2)  # has to grow
    for i, row in enumerate(rows):
        last = runner.prefill(cache, i, row, chunk=4)
        np.testing.assert_allclose(last, model.logits(row)[-1], atol=TOLERANCE, rtol=0)
    for step in range(12):
        new = [step, 3 * step, END]
        logits = runner.decode(cache, new)
        for row, token, found in zip(rows, new, logits, strict=True):
            row.append(token)
            np.testing.assert_allclose(found, model.logits(row)[-1], atol=TOLERANCE, rtol=0)


def test_an_idle_row_disturbs_nobody_and_can_go_on(model: TinyModel, runner: Runner) -> None:
    rows = [tokens(5), tokens(9)]
    cache = runner.new_cache(2)
    for i, row in enumerate(rows):
        runner.prefill(cache, i, row)
    for token in (1, 2, 3):
        rows[1].append(token)
        logits = runner.decode(cache, [77, token], active=[False, True])
        np.testing.assert_allclose(logits[1], model.logits(rows[1])[-1], atol=TOLERANCE, rtol=0)
    rows[0].append(8)
    np.testing.assert_allclose(runner.decode(cache, [8, 9])[0], model.logits(rows[0])[-1], atol=TOLERANCE, rtol=0)


def test_a_prompt_can_be_continued(model: TinyModel, runner: Runner) -> None:
    ids = tokens(20)
    cache = runner.new_cache(2)
    runner.prefill(cache, 1, ids[:7])
    np.testing.assert_allclose(runner.prefill(cache, 1, ids[7:]), model.logits(ids)[-1], atol=TOLERANCE, rtol=0)
    assert cache.lengths.tolist() == [0, 20]


def test_greedy_generation_equals_transformers(model: TinyModel, runner: Runner) -> None:
    prompts = [tokens(4, seed=1), [0], tokens(11, seed=2)]
    answers = runner.generate(prompts, 20, stop_tokens=())
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = model.model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=END
        )
        assert answer == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("penalty", [1.4, 0.7])
def test_repetition_penalty_equals_transformers_generation(model: TinyModel, runner: Runner, penalty: float) -> None:
    prompt = tokens(6)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": END}
    expected, plain = (
        model.model.generate(torch.tensor([prompt]), repetition_penalty=value, **options)[0, 6:].tolist()
        for value in (penalty, 1.0)
    )
    assert expected != plain
    assert runner.generate([prompt], 24, Sampling(repetition_penalty=penalty), stop_tokens=())[0] == expected


def test_a_top_k_of_1_and_a_tiny_top_p_or_temperature_are_greedy(runner: Runner) -> None:
    greedy = runner.generate([tokens(5)], 12, stop_tokens=())
    for sampling in (
        Sampling(temperature=3.0, top_k=1, seed=1),
        Sampling(temperature=3.0, top_p=1e-9, seed=2),
        Sampling(temperature=1e-310, seed=3),
    ):
        assert runner.generate([tokens(5)], 12, sampling, stop_tokens=()) == greedy


@pytest.mark.parametrize("rows", [0, -1])
def test_a_batch_of_no_rows_is_refused(runner: Runner, rows: int) -> None:
    with pytest.raises(UsageError, match=f"a batch of {rows} rows"):
        runner.new_cache(rows)
    with pytest.raises(UsageError, match="0 prompts"):
        runner.generate([], 4)
    for row in (1, -1):
        with pytest.raises(UsageError, match=f"row {row}"):
            runner.prefill(runner.new_cache(1), row, [1])


def test_a_cache_that_no_memory_holds_is_said(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOMEM, "no room")

    cache = runner.new_cache(1, capacity=4)
    monkeypatch.setattr("exporter.runtime.cache.mmap", no_room)
    with pytest.raises(
        EnvironmentLacking, match=r"no memory for a cache of 32\.8 kB\nexpected: room for 1 rows of 32 "
    ):
        cache.reserve(32)  # 2 layers of key and value, 4 heads of 16 in float32


def test_generation_ends_at_a_stop_token_and_at_the_last_position(runner: Runner) -> None:
    free = runner.generate([tokens(4)], 10, stop_tokens=())[0]
    stop = free[6]
    events = list(runner.stream([tokens(4)], 10, stop_tokens=[stop]))
    assert [event.id for event in events] == free[: free.index(stop) + 1]
    assert [event.reason for event in events][-1] == "stop"
    # The last position gives one more token, which has no position of its own.
    assert len(runner.generate([tokens(POSITIONS - 3)], 100, stop_tokens=())[0]) == 4
    assert len(runner.generate([tokens(POSITIONS)], 100, stop_tokens=())[0]) == 1


def test_nothing_runs_past_the_last_position(runner: Runner) -> None:
    with pytest.raises(UsageError, match=f"at most {POSITIONS}"):
        runner.logits(tokens(POSITIONS + 1))
    cache = runner.new_cache(1)
    runner.prefill(cache, 0, tokens(POSITIONS))
    with pytest.raises(UsageError, match=f"at most {POSITIONS}"):
        runner.decode(cache, [1])
    with pytest.raises(UsageError, match=f"at most {POSITIONS}"):
        runner.generate([tokens(POSITIONS + 1)], 1)


@pytest.mark.parametrize("ids", [[], [-1], [257], [1, 999]])
def test_tokens_outside_the_vocabulary_are_refused(runner: Runner, ids: list[int]) -> None:
    with pytest.raises(UsageError):
        runner.logits(ids)


def test_sampling_is_repeatable_and_independent_of_the_batch(runner: Runner) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=7)
    prompts = [tokens(5), tokens(8)]
    both = runner.generate(prompts, 8, sampling, stop_tokens=())
    assert both == runner.generate(prompts, 8, sampling, stop_tokens=())
    assert both[0] == runner.generate(prompts[:1], 8, sampling, stop_tokens=())[0]
    assert both != runner.generate(prompts, 8, Sampling(temperature=1.0, top_p=0.9, seed=8), stop_tokens=())


def test_logits_that_are_not_finite_end_generation(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    with torch.no_grad():
        model.model.transformer.ln_f.bias[3] = 3e38
        model.model.transformer.wte.weight[5, 3] = 10  # finite weights whose product is not
    model.model.save_pretrained(tmp_path)
    export(tmp_path)
    with pytest.raises(ParityFailed, match="not finite"):
        load(tmp_path).generate([[1]], 1)


def test_the_float16_graph_of_the_cuda_target_computes_the_same_model(model: TinyModel) -> None:
    export(model.directory, target=["cuda"])
    runner = load(model.directory, target="cuda", provider="cpu", threads=1)
    ids = tokens(POSITIONS)
    np.testing.assert_allclose(runner.logits(ids), model.logits(ids), atol=0.02, rtol=0)
    rows = [tokens(n, seed=n) for n in (9, 1, 5)]
    cache = runner.new_cache(3)
    for i, row in enumerate(rows):
        runner.prefill(cache, i, row)
    logits = runner.decode(cache, [1, 2, 3])
    for i, row in enumerate(rows):
        np.testing.assert_allclose(logits[i], model.logits([*row, i + 1])[-1], atol=0.02, rtol=0)
