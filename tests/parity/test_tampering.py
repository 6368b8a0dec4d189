"""Tampering from outside: what was changed after the merge fails or is refused, also where the hashes were redone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from exporter.errors import InputRefused
from exporter.graph.export import export
from exporter.merging.merge import merge
from exporter.parity.bundle_check import Run, verify_bundle
from exporter.parity.documents import tokens_sha256
from exporter.parity.gates import load_thresholds
from exporter.parity.inputs import check_bundle_inputs
from exporter.parity.oracle import Oracle
from exporter.parity.reference import capture_store
from exporter.parity.result import BundleResult
from exporter.parity.scoring import LogitStore
from exporter.parity.verify import verify
from exporter.parity.weights import check_weights
from exporter.sources.checkpoint import open_checkpoint
from tests.parity.conftest import Made, open_bundle, replace_tensors, update_manifest

LIMITS = load_thresholds().projection
C_ATTN = "transformer.h.{}.attn.c_attn.weight"


def failed(result: BundleResult) -> set[str]:
    return {gate.gate for gate in result.gates if gate.outcome == "FAIL"}


def weight_failures(directory: Path, oracle: Oracle) -> set[str]:
    """The gates that need no forward pass."""
    return {gate.gate for gate in check_weights(open_bundle(directory), oracle, LIMITS).gates if gate.outcome == "FAIL"}


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.merged, tmp_path / "merged"))


def flip(bit: int, name: str, place: int) -> Callable[[Path], dict[str, torch.Tensor]]:
    def change(directory: Path) -> dict[str, torch.Tensor]:
        value = load_file(directory / "model.safetensors")[name]
        view = value.view(torch.int16 if value.element_size() == 2 else torch.int32).view(-1)
        view[place] ^= 1 << bit
        return {name: value}

    return change


@pytest.mark.parametrize("update", [True, False], ids=["hashes redone", "hashes kept"])
@pytest.mark.parametrize("bit", [0, 4, 9, 13])
@pytest.mark.parametrize("name", [C_ATTN.format(1), "transformer.wte.weight", "transformer.h.2.mlp.c_proj.bias"])
def test_one_flipped_bit(name: str, bit: int, update: bool, copy: Path, scored: Run) -> None:
    value = load_file(copy / "model.safetensors")[name].view(-1)
    place = int(value.abs().argmax())  # float16's bit 0 is here the smallest change that there is
    replace_tensors(copy, "model.safetensors", flip(bit, name, place)(copy), update=update)
    if not update:
        with pytest.raises(InputRefused, match="SHA-256"):
            open_bundle(copy)
        return
    assert weight_failures(copy, scored.oracle) >= {"weights.elements" if "c_attn" in name else "weights.untouched"}


@pytest.mark.parametrize(("dtype", "bit"), [("float32", 3), ("bfloat16", 0)])
def test_the_lowest_bit_of_other_types_that_is_known(dtype: str, bit: int, made: Made, tmp_path: Path) -> None:
    """In float32 the last bits of a right merge depend on the order of LoRA's sum, where it is as large as here."""
    merge(base=made.base, adapter=made.adapter, out=tmp_path / "merged", template="alpaca", dtype=dtype)
    export(tmp_path / "merged")
    oracle = Oracle(open_checkpoint(made.base), [(made.adapter, 1.0)])
    assert weight_failures(tmp_path / "merged", oracle) == set()
    name = C_ATTN.format(0)
    whole = load_file(tmp_path / "merged" / "model.safetensors")[name].clone()  # it is mapped, and the file changes
    seen = 0
    for place in range(0, 400, 50):
        change = flip(bit, name, place)(tmp_path / "merged")
        replace_tensors(tmp_path / "merged", "model.safetensors", change)
        seen += weight_failures(tmp_path / "merged", oracle) == {"weights.elements"}
        replace_tensors(tmp_path / "merged", "model.safetensors", {name: whole})
    assert weight_failures(tmp_path / "merged", oracle) == set()
    assert seen >= 7


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("part", ["attn.c_attn", "mlp.c_fc"])
@pytest.mark.parametrize("factor", [1.05, 0.95, -1.0, 0.0])
def test_one_edited_scale_of_a_quantized_bundle(
    kind: str, factor: float, part: str, made: Made, scored: Run, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(getattr(made, kind), tmp_path / kind))
    name, scales = scales_of(directory, part)
    scales.view(-1)[11] *= factor
    replace_tensors(directory, "weights.safetensors", {name: scales}, update=False)
    with pytest.raises(InputRefused, match="SHA-256"):
        open_bundle(directory)
    update_manifest(directory, "weights.safetensors")
    assert "weights.step" in weight_failures(directory, scored.oracle)


def scales_of(directory: Path, part: str) -> tuple[str, torch.Tensor]:
    """Name and values of one matrix' scales."""
    tensors = load_file(directory / "weights.safetensors")
    name = next(n for n in tensors if n.startswith(f"transformer.h.1.{part}.weight") and n.endswith(".scales"))
    return name, tensors[name].clone()


def test_two_layers_swapped(copy: Path, scored: Run) -> None:
    tensors = load_file(copy / "model.safetensors")
    a, b = C_ATTN.format(0), C_ATTN.format(2)
    replace_tensors(copy, "model.safetensors", {a: tensors[b], b: tensors[a]}, update=False)
    with pytest.raises(InputRefused, match="SHA-256"):
        open_bundle(copy)
    update_manifest(copy, "model.safetensors")
    found = verify_bundle(scored, open_bundle(copy))
    assert found.verdict == "FAIL"
    assert "weights.elements" in failed(found)
    assert found.origin is not None
    assert set(found.origin.parts) == {"block 0", "block 2"}


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap_two_tokens(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def drop_the_last_merge(content: dict) -> None:
    content["model"]["merges"].pop()


def lower_case(content: dict) -> None:
    content["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize("change", [swap_two_tokens, drop_the_last_merge, lower_case])
def test_another_tokenizer(change: Callable[[dict], None], copy: Path, scored: Run) -> None:
    edit_json(copy / "tokenizer.json", change)
    with pytest.raises(InputRefused, match="SHA-256"):
        open_bundle(copy)
    update_manifest(copy, "tokenizer.json")
    with pytest.raises(InputRefused, match="tokenizer"):
        check_bundle_inputs(open_bundle(copy), scored.pair, scored.documents)


@pytest.mark.parametrize(
    ("key", "value"), [("activation_function", "relu"), ("layer_norm_epsilon", 1e-4), ("n_head", 8)]
)
def test_another_model_in_config_json(key: str, value: object, copy: Path, scored: Run) -> None:
    """F is built from the bundle's config.json: a graph that errs in the same way would agree with it."""
    edit_json(copy / "config.json", lambda content: content.update({key: value}))
    update_manifest(copy, "config.json")
    with pytest.raises(InputRefused, match=key):
        check_bundle_inputs(open_bundle(copy), scored.pair, scored.documents)


def test_the_base_itself_as_the_bundle(made: Made, scored: Run, tmp_path: Path) -> None:
    shutil.copytree(made.base, tmp_path / "base")
    for precision in ("native", "int8"):
        (bundle,) = export(tmp_path / "base", precision=(precision,))
        found = verify_bundle(scored, open_bundle(bundle.directory))
        assert found.verdict == "FAIL"
        assert "weights.projection" in failed(found)
        assert found.origin is not None
        assert found.origin.stage == "merge"
        assert len(found.origin.parts) == 3


class Recorded:
    """A model whose logits are already in another store."""

    def __init__(self, store: LogitStore, model: str) -> None:
        self._logits = {document.tokens: self._whole(store, model, document) for document in store.documents}

    @staticmethod
    def _whole(store: LogitStore, model: str, document) -> np.ndarray:
        logits = np.zeros((len(document.tokens), store.vocabulary), np.float32)
        logits[document.positions] = store.read(model, document)
        return logits

    def logits(self, token_ids, /) -> np.ndarray:
        return self._logits[tuple(token_ids)]


@pytest.mark.parametrize("source", ["the bundle", "the truth"])
def test_a_capture_that_was_not_made_from_the_8_bit_model(source: str, made: Made, scored: Run, tmp_path: Path) -> None:
    """It bears the right hashes: base, adapter and tokens are what `capture` would write."""
    from exporter.parity.bundle_check import _runner

    store = LogitStore(tmp_path, scored.documents, scored.pair.vocabulary)
    model = _runner(open_bundle(made.merged)) if source == "the bundle" else Recorded(scored.store, "T")
    store.score("R", model)
    capture_store(
        store,
        tmp_path / "reference.safetensors",
        tokens_sha256=tokens_sha256(scored.documents),
        base_files=scored.pair.base_files,
        adapter_files=scored.pair.adapter_files,
        weights=[1.0],
        environment={"device": "cpu"},
    )
    found = verify(
        base=made.base,
        adapter=made.adapter,
        bundle=made.merged,
        prompts=made.prompts,
        reference=tmp_path / "reference.safetensors",
    )
    assert found.verdict == "FAIL"
    apart = {gate.pair: gate.outcome for gate in found.bundles[0].gates if gate.gate == "evidence.apart"}
    assert apart["R-O" if source == "the bundle" else "T-R"] == "FAIL"


def test_a_bundle_is_no_reference(made: Made) -> None:
    for reference in (made.merged, made.merged / "model.onnx", made.merged / "model.safetensors"):
        with pytest.raises(InputRefused, match="reference"):
            verify(base=made.base, adapter=made.adapter, bundle=made.merged, prompts=made.prompts, reference=reference)
