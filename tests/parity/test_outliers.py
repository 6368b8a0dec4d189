"""The columns that LLM.int8 treats apart, against the inputs that transformers' own float32 layers are given."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import exporter
from exporter.parity.inputs import open_pair
from exporter.parity.models import OUTLIER_THRESHOLD, load_reference
from exporter.parity.outliers import OUTLIERS, count_outlier_columns
from exporter.parity.reference import read_capture
from tests.pairs import Pair, gpt2_config, save_adapter, save_base
from tests.pairs import lora_config as lora

TOKENS = list(b"The outliers of a document are those of all of its tokens.")


def pair_with_outliers(directory: Path) -> Pair:
    """Two columns of the second block's c_attn far beyond the threshold, one of the third's c_fc."""
    pair = Pair(directory / "base", directory / "adapter")
    model: Any = save_base(pair.base, gpt2_config(), torch.float16)
    with torch.no_grad():
        model.transformer.h[1].ln_1.weight[[5, 9]] = 60.0
        model.transformer.h[2].ln_2.bias[7] = -40.0
    model.save_pretrained(pair.base)
    save_adapter(pair.adapter, model, lora())
    return pair


def expected(pair: Pair) -> str:
    model: Any = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    found: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, Conv1D):
            module.register_forward_pre_hook(lambda _, given: found.append(given[0][0].abs().amax(0)))  # (inputs,)
    with torch.no_grad():
        model(torch.tensor([TOKENS]))
    largest = torch.cat(found)
    assert not ((largest - OUTLIER_THRESHOLD).abs() < 0.1).any(), (
        "a column so near to the threshold may fall either way"
    )
    assert int((largest > OUTLIER_THRESHOLD).sum()) >= 3
    layers = sum(bool((one > OUTLIER_THRESHOLD).any()) for one in found)
    return f"{int((largest > OUTLIER_THRESHOLD).sum())} of {len(largest)} columns, in {layers} of {len(found)} layers"


def test_columns_are_counted_over_all_tokens_of_a_document(tmp_path: Path) -> None:
    pair = pair_with_outliers(tmp_path)
    opened = open_pair(pair.base, [(pair.adapter, 1.0)])
    model = load_reference(opened.base, opened.weighted)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    assert count_outlier_columns(model, TOKENS) == expected(pair)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_capture_says_how_many_there_were(tmp_path: Path) -> None:
    pair = pair_with_outliers(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "Outliers."}\n')
    out = tmp_path / "reference.safetensors"
    exporter.capture(base=pair.base, adapter=pair.adapter, out=out, prompts=prompts)
    count, _, inputs = read_capture(out).environment[OUTLIERS].split()[:3]
    assert 3 <= int(count) < int(inputs)
