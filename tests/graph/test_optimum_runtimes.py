"""Which runtimes take a bundle that optimum traced: ours, optimum's, `exporter serve`; and genai, which does not."""

import asyncio
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from exporter.graph.bundle import Bundle
from exporter.graph.export import export
from exporter.runtime.load import load
from tests.graph.conftest import END, TinyModel, llama_config, save_byte_tokenizer, tokens
from tests.graph.runtimes import genai_tokens, optimum_tokens
from tests.serving.arithmetic import asked, ids, read
from tests.serving.running import running

pytest.importorskip("optimum.exporters.onnx", reason="optimum's ONNX part is not installed", exc_type=ImportError)

NEW = 16
PROMPTS = [tokens(7, seed=1), [0], tokens(12, seed=2)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config(num_key_value_heads=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    directory = tmp_path_factory.mktemp("llama") / "merged"
    model.save_pretrained(directory)
    save_byte_tokenizer(directory)
    return TinyModel(directory, model)


@pytest.fixture(scope="module")
def bundle(llama: TinyModel) -> Bundle:
    return export(llama.directory, builder="optimum")[0]


@pytest.fixture(scope="module")
def expected(llama: TinyModel) -> list[list[int]]:
    """transformers' greedy tokens; no choice among them is a tie."""
    answers = [llama.greedy(prompt, NEW) for prompt in PROMPTS]
    assert min(margin for _, margins in answers for margin in margins) > 1e-3
    assert len({tuple(answer) for answer, _ in answers}) == len(PROMPTS)
    assert not any(END in answer for answer, _ in answers)
    return [answer for answer, _ in answers]


def test_our_runner_generates_transformers_tokens(bundle: Bundle, expected: list[list[int]]) -> None:
    assert load(bundle.directory, threads=1).generate(PROMPTS, NEW) == expected


def test_optimums_own_model_opens_it(bundle: Bundle, expected: list[list[int]]) -> None:
    """Its weights lie under another file name and other tensor names than optimum writes them."""
    assert [optimum_tokens(bundle, prompt, NEW, END) for prompt in PROMPTS] == expected


def test_it_is_served(bundle: Bundle, expected: list[list[int]]) -> None:
    """Several streams at once, more than there are slots, and one that begins as another did."""
    prompts = [*PROMPTS, PROMPTS[0] + expected[0][:3]]

    async def main(engine: Any) -> list[list[int]]:
        streams = [engine.submit(asked(prompt, NEW - 3)) for prompt in prompts]
        return [ids(steps) for steps in await asyncio.gather(*map(read, streams))]

    with running([f"llama={bundle.directory}"], slots=2) as server:
        (model,) = server.service.models.values()
        answers = asyncio.run(main(model.engine))
        assert answers[:3] == [answer[: NEW - 3] for answer in expected]
        assert answers[3] == expected[0][3:]
        text = server.client().completions.create(model="llama", prompt="Hello", max_tokens=4, temperature=0)
        assert text.usage is not None
        assert text.usage.completion_tokens == 4


def test_genai_does_not_find_a_genai_config(bundle: Bundle) -> None:
    with pytest.raises(RuntimeError, match=r"genai_config\.json"):
        genai_tokens(bundle, PROMPTS[0], NEW, END)
