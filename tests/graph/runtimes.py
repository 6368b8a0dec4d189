"""Greedy tokens of one prompt from each runtime that opens a bundle, up to and without the token that ends it."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.graph.bundle import Bundle
from exporter.runtime.load import load


def until(tokens: Sequence[int], end: int) -> list[int]:
    tokens = list(tokens)
    return tokens[: tokens.index(end)] if end in tokens else tokens


def runner_tokens(bundle: Bundle, prompt: list[int], count: int, end: int, adapter: str | None = None) -> list[int]:
    """Plain onnxruntime, as the Runner drives it."""
    return until(load(bundle, adapter=adapter, threads=1).generate([prompt], count, stop_tokens=[end])[0], end)


def optimum_tokens(bundle: Bundle, prompt: list[int], count: int, end: int) -> list[int]:
    runtime = pytest.importorskip(
        "optimum.onnxruntime", reason="optimum's ONNX part is not installed", exc_type=ImportError
    )
    model = runtime.ORTModelForCausalLM.from_pretrained(bundle.directory, use_cache=True, use_io_binding=False)
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return until(out[0, len(prompt) :].tolist(), end)


def genai_tokens(bundle: Bundle, prompt: list[int], count: int, end: int, adapter: str | None = None) -> list[int]:
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(bundle.directory))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, parameters)
    if adapter is not None:
        adapters = og.Adapters(model)
        adapters.load(str(bundle.directory / f"{adapter}.onnx_adapter"), adapter)
        generator.set_active_adapter(adapters, adapter)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return until(generator.get_sequence(0)[len(prompt) :].tolist(), end)


def clear_stretches(
    bundle: Bundle, prompt: list[int], chosen: list[int], margin: float, adapter: str | None
) -> list[slice]:
    """The parts of `chosen` without a choice whose two best logits are nearer than `margin`."""
    runner = load(bundle, adapter=adapter, threads=1)
    logits = np.sort(runner.logits([*prompt, *chosen])[len(prompt) - 1 : -1], axis=1)
    unclear = np.flatnonzero(logits[:, -1] - logits[:, -2] < margin).tolist()
    bounds = pairwise([-1, *unclear, len(chosen)])
    return [slice(before + 1, after) for before, after in bounds if before + 1 < after]


def plain_files(directory: Path) -> bool:
    """No links of either kind."""
    files = list(directory.iterdir())
    return all(not one.is_symlink() and one.is_file() and one.stat().st_nlink == 1 for one in files)
