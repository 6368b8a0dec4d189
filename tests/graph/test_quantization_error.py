"""Chosen scales against ggml's q8_0 and q4_0 and against plain rounding, at equal bits a weight: in error and in KL.

The model is the packaged trained pair, merged in float32 by PEFT itself; the texts are the packaged Alpaca prompts.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

import exporter
from exporter.graph.bundle import Bundle
from exporter.graph.components import ACCURACY_LEVEL
from exporter.graph.dequantize import dequantized_weights
from exporter.graph.export import export
from exporter.graph.weights import WEIGHTS
from exporter.runtime.load import load
from exporter.sources.safetensors_file import read_header
from tests.graph.ggml import BLOCK, q4_0, q8_0, rounded_to_nearest
from tests.graph.quantizing import restored

PACKAGE = Path(exporter.__file__).parent
DOCUMENTS, LENGTH, DRAWS = 4, 64, 4
Quantizer = Callable[[np.ndarray], np.ndarray]
GGML: dict[str, Quantizer] = {"int8": q8_0, "int4": q4_0}


@dataclass(frozen=True, slots=True)
class Merged:
    directory: Path
    model: GPT2LMHeadModel
    documents: list[list[int]]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Merged:
    directory = tmp_path_factory.mktemp("demo") / "merged"
    base = AutoModelForCausalLM.from_pretrained(PACKAGE / "demo/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(PACKAGE / "demo/adapter")).merge_and_unload().eval()
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "demo/base")
    lines = (PACKAGE / "parity/prompts/alpaca.jsonl").read_text().splitlines()[:DOCUMENTS]
    texts = [
        f"### Instruction:\n\n{one['instruction']}\n\n### Response:\n{one['output']}" for one in map(json.loads, lines)
    ]
    return Merged(directory, model, [tokenizer(text).input_ids[:LENGTH] for text in texts])


@pytest.fixture(scope="module")
def bundles(merged: Merged) -> dict[str, Bundle]:
    return {precision: export(merged.directory, precision=[precision])[0] for precision in GGML}


def log_probabilities(model: GPT2LMHeadModel, documents: list[list[int]]) -> torch.Tensor:
    """float64 (tokens of all documents, V)."""
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0].double() for ids in documents]
    return torch.cat(logits).log_softmax(-1)


def kl(reference: torch.Tensor, candidate: torch.Tensor) -> float:
    """Mean KL(reference || candidate) in nats."""
    return float((reference.exp() * (reference - candidate)).sum(-1).mean())


def in_blocks(matrix: torch.Tensor) -> np.ndarray:
    """A Conv1D's weight (in, out) as blocks along its inputs, or an embedding's rows as blocks."""
    return matrix.contiguous().numpy().reshape(-1, BLOCK)


def matrices(model: GPT2LMHeadModel) -> dict[str, torch.Tensor]:
    return {name: p.data.T for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name}


def with_matrices(merged: Merged, bundle: Bundle, quantizer: Quantizer | None) -> GPT2LMHeadModel:
    """The model that carries the bundle's weights, with the blocks' matrices as `quantizer` makes them instead."""
    model = GPT2LMHeadModel(merged.model.config).eval()
    model.load_state_dict(dict(dequantized_weights(bundle)), strict=False)
    model.tie_weights()
    if quantizer is not None:
        wanted = {name: quantizer(in_blocks(matrix)) for name, matrix in matrices(merged.model).items()}
        for name, matrix in matrices(model).items():
            matrix.copy_(torch.from_numpy(wanted[name]).reshape(matrix.shape))
    return model


def squared_error(merged: Merged, model: GPT2LMHeadModel) -> float:
    truth = matrices(merged.model)
    errors = [float((matrix - truth[name]).square().sum()) for name, matrix in matrices(model).items()]
    return sum(errors) / sum(float(matrix.square().sum()) for matrix in truth.values())


def plain(bits: int) -> Quantizer:
    return lambda blocks: rounded_to_nearest(blocks, bits)


def test_the_files_hold_no_more_bits_than_ggml(bundles: dict[str, Bundle]) -> None:
    for precision, bits in (("int8", 8 + 16 / 32), ("int4", 4 + 16 / 32)):
        infos = read_header(bundles[precision].directory / WEIGHTS)[0]
        codes = {name: info for name, info in infos.items() if name.endswith(f".{precision}t")}
        nbytes = sum(info.nbytes + infos[f"{name}.scales"].nbytes for name, info in codes.items())
        weights = sum(info.nbytes for info in codes.values()) * 8 // int(precision[3:])
        assert len(codes) == 4 * 12
        assert 8 * nbytes / weights == bits == bundles[precision].section["bits_per_weight"]["matrices"]


@pytest.mark.parametrize(("precision", "share"), [("int8", 0.85), ("int4", 0.92)])
def test_squared_error_is_below_ggmls_and_plain_rounding(
    merged: Merged, bundles: dict[str, Bundle], precision: str, share: float
) -> None:
    bundle = bundles[precision]
    ours = squared_error(merged, with_matrices(merged, bundle, None))
    for other in (GGML[precision], plain(int(precision[3:]))):
        assert ours < share * squared_error(merged, with_matrices(merged, bundle, other))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_kl_against_its_own_float32_run_is_no_worse_than_ggmls(merged: Merged, precision: str) -> None:
    """Mean over ways to cut the inputs into blocks: the KL of a single one depends on the luck of its roundings."""
    documents, bits = merged.documents, int(precision[3:])
    truth = log_probabilities(merged.model, documents)
    names: dict[str, Quantizer] = {"ours": lambda x: chosen(x, bits), "ggml": GGML[precision], "plain": plain(bits)}
    model, mean = copy.deepcopy(merged.model), {}
    for name, quantizer in names.items():
        draws = []
        for seed in range(DRAWS):
            requantize(model, merged.model, quantizer, seed)
            draws.append(kl(truth, log_probabilities(model, documents)))
        mean[name] = float(np.mean(draws))
    print(precision, {name: f"{value:.3e}" for name, value in mean.items()})
    assert mean["ours"] <= mean["ggml"]
    assert mean["ours"] <= mean["plain"]


def requantize(model: GPT2LMHeadModel, original: GPT2LMHeadModel, quantizer: Quantizer, seed: int) -> None:
    """Put quantized matrices of `original` into `model`, the inputs cut into blocks in an order of the seed."""
    truth = matrices(original)
    for i, (name, matrix) in enumerate(matrices(model).items()):
        order = torch.randperm(matrix.shape[1], generator=torch.Generator().manual_seed(1000 * seed + i))
        matrix[:, order] = torch.from_numpy(quantizer(in_blocks(truth[name][:, order]))).reshape(matrix.shape)


def chosen(blocks: np.ndarray, bits: int) -> np.ndarray:
    """What the export makes of blocks (n, 32)."""
    return restored(torch.from_numpy(blocks), bits).numpy()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_bundle_holds_these_very_weights(merged: Merged, bundles: dict[str, Bundle], precision: str) -> None:
    for name, matrix in matrices(with_matrices(merged, bundles[precision], None)).items():
        wanted = chosen(in_blocks(matrices(merged.model)[name]), int(precision[3:]))
        assert torch.equal(matrix, torch.from_numpy(wanted).reshape(matrix.shape)), name


def test_embedding_and_head_at_4_bits_would_cost_more_than_the_rest(merged: Merged, bundles: dict[str, Bundle]) -> None:
    """Why they stay at 8: at 4 they add half of the KL or more again, and are a few percent of a large model."""
    bundle, truth = bundles["int4"], log_probabilities(merged.model, merged.documents)
    model = with_matrices(merged, bundle, None)
    at_8 = kl(truth, log_probabilities(model, merged.documents))
    table = model.transformer.wte.weight.data
    original = merged.model.transformer.wte.weight.data
    table.copy_(torch.from_numpy(q4_0(in_blocks(original))).reshape(table.shape))
    assert kl(truth, log_probabilities(model, merged.documents)) > 1.5 * at_8


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_bundle_itself_has_this_kl(
    merged: Merged, bundles: dict[str, Bundle], precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The graph run by ONNX Runtime with float activations, against the model that carries its weights."""
    monkeypatch.setitem(ACCURACY_LEVEL, "cpu", 1)
    bundle = export(merged.directory, precision=[precision], out=tmp_path)[0]
    documents = merged.documents[:1]
    logits = load(bundle, threads=1).logits(documents[0])
    expected = log_probabilities(with_matrices(merged, bundle, None), documents)
    assert kl(expected, torch.from_numpy(logits).double().log_softmax(-1)) < 1e-8
