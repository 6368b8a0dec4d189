"""One directory, three runtimes: transformers, optimum's ORTModelForCausalLM and onnxruntime-genai agree."""

import numpy as np
import pytest
import torch

from exporter.graph.export import export
from tests.graph.conftest import END, TinyModel, save_byte_tokenizer, tiny_model

NEW = 16
TIE = 1e-4  # below this margin transformers' own choice is a coin toss
PROMPTS = ["Hello!", "!", "a longer prompt", "!!x"]  # "!" is token 0 and so a padding trap


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    directory = tmp_path_factory.mktemp("interop")
    model = tiny_model(directory, torch.float16, n_positions=64)
    save_byte_tokenizer(directory)
    export(directory)
    return model


def encode(text: str) -> list[int]:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    pieces = ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [alphabet.index(character) for piece, _ in pieces for character in piece]


def assert_same_greedy(model: TinyModel, prompts: list[list[int]], answers: list[list[int]]) -> None:
    compared = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        expected, margins = model.greedy(prompt, NEW)
        tie = next((i for i, margin in enumerate(margins) if margin < TIE), NEW)
        end = min(tie, expected.index(END) + 1 if END in expected else NEW)
        assert answer[:end] == expected[:end]
        compared += end
    assert compared >= 0.9 * NEW * len(prompts)


def test_the_prompts_hold_token_0() -> None:
    assert encode("!") == [0]


def test_optimum_left_padded_batch(exported: TinyModel) -> None:
    runtime = pytest.importorskip(
        "optimum.onnxruntime", reason="optimum's ONNX part is not installed", exc_type=ImportError
    )
    loaded = runtime.ORTModelForCausalLM.from_pretrained(exported.directory, use_cache=True, use_io_binding=False)
    prompts = [encode(text) for text in PROMPTS]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    out = loaded.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=END)
    assert_same_greedy(exported, prompts, out[:, width:].tolist())


@pytest.mark.parametrize("texts", [PROMPTS[2:3], PROMPTS])
def test_genai_with_a_shared_cache(exported: TinyModel, texts: list[str]) -> None:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(exported.directory))
    tokenizer = og.Tokenizer(model)
    prompts = [encode(text) for text in texts]
    for text, prompt in zip(texts, prompts, strict=True):
        assert tokenizer.encode(text).tolist() == prompt
    width = max(map(len, prompts))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=width + NEW, batch_size=len(prompts), do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array([row + [END] * (width - len(row)) for row in prompts], np.int32))
    answers: list[list[int]] = [[] for _ in prompts]
    while not generator.is_done():
        generator.generate_next_token()
        for answer, token in zip(answers, generator.get_next_tokens(), strict=True):
            answer.append(int(token))
    assert_same_greedy(exported, prompts, answers)
