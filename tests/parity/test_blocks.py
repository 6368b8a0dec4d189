"""A model run block by block says what the whole model says: transformers and PEFT, loaded as users load them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTNeoXConfig, LlamaConfig, OPTConfig

from exporter.errors import EnvironmentLacking, InputRefused
from exporter.parity import blocks_choice, memory, models
from exporter.parity.bases import BaseOptions, resized_rows
from exporter.parity.blocks import BlockModel, Float32, Unsupported
from exporter.parity.blocks_choice import Fp32Model, score_fp32
from exporter.parity.blocks_scoring import BlockScorer, sweep
from exporter.parity.blocks_specs import base_blocks, carried_blocks, merged_blocks, truth_blocks
from exporter.parity.documents import RESPONSE, Document
from exporter.parity.int8_model import load_int8
from exporter.parity.models import TruthModels, base_scorer, load_weights
from exporter.parity.scoring import LogitStore
from exporter.sources.adapter import open_adapter
from exporter.sources.checkpoint import Checkpoint, open_checkpoint
from tests.pairs import as_bin, gpt2_config, make_pair, save_base
from tests.parity.conftest import Made, open_bundle
from tests.parity.test_methods import CASES, write_random_adapter

pytestmark = pytest.mark.filterwarnings("ignore")

ROW = [1, 5, 9, 256, *range(30, 54)]  # the tokens that CASES train, and others
SIZES: dict[str, Any] = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
# Mistral-like windows need no flag of ours: OPT projects its embeddings, NeoX rotates a part, Llama shares heads.
ARCHITECTURES: dict[str, tuple[Any, list[str]]] = {
    "gpt2": (gpt2_config(scale_attn_by_inverse_layer_idx=True), ["c_attn", "c_proj"]),
    "llama": (LlamaConfig(**SIZES, intermediate_size=64, num_key_value_heads=1), ["q_proj", "down_proj"]),
    "opt": (OPTConfig(**SIZES, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=16), ["q_proj", "fc2"]),
    "neox": (GPTNeoXConfig(**SIZES, intermediate_size=64, rotary_pct=0.5), ["query_key_value", "dense"]),
}
METHODS = [
    "dora",
    "bias all",
    "embedding",
    "head",
    "saved embedding",
    "saved block",
    "tokens",
    "resized",
    "ia3",
    "norms",
]


@dataclass(frozen=True)
class Opened:
    base: Checkpoint
    adapters: list[tuple[Path, float]]
    options: BaseOptions

    def blocks(self) -> dict[str, BlockModel]:
        return {
            "T": truth_blocks(self.base, self.adapters, self.options),
            "M32": merged_blocks(self.base, self.adapters, self.options),
            "B": base_blocks(self.base, self.options),
        }

    def whole(self) -> dict[str, Float32]:
        truth = TruthModels(self.base, self.adapters, self.options)
        first = truth.truth().logits(ROW)
        return {"T": first, "M32": truth.merged().logits(ROW), "B": base_scorer(self.base, self.options).logits(ROW)}


def require_equal(opened: Opened) -> None:
    wanted = opened.whole()
    assert np.abs(wanted["T"] - wanted["B"]).max() > 1e-3  # the adapter says something
    for name, model in opened.blocks().items():
        assert np.abs(BlockScorer(model).logits(ROW) - wanted[name]).max() <= 1e-6, name
        together = states_together(model)
        assert np.abs(together[0] - together[1]).max() > 1e-4, name
        assert np.abs(together - states_apart(model)).max() <= 1e-6, name


def three_states(model: BlockModel) -> Float32:
    first = model.embed(ROW)
    return np.stack([first, first[::-1], 0.5 * first])


def states_together(model: BlockModel) -> Float32:
    return model.run_all(0, ROW, three_states(model))


def states_apart(model: BlockModel) -> Float32:
    return np.stack([model.run(0, ROW, one) for one in three_states(model)])


@pytest.mark.parametrize("onto", ["original", "int8"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_the_whole_model(tmp_path: Path, name: str, onto: Any) -> None:
    config, targets = ARCHITECTURES[name]
    lora = LoraConfig(r=4, lora_alpha=64, target_modules=targets, fan_in_fan_out=name == "gpt2")
    pair = make_pair(tmp_path, config, lora=lora)
    base = open_checkpoint(pair.base)
    require_equal(Opened(base, [(pair.adapter, 1.0), (pair.adapter, -0.5)], BaseOptions(onto)))


@pytest.mark.parametrize("name", METHODS)
def test_every_form_of_adapter_equals_the_whole_model(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    save_base(tmp_path / "base", case.config, case.dtype)
    write_random_adapter(tmp_path / "adapter", tmp_path / "base", case.adapter, case.before)
    base = open_checkpoint(tmp_path / "base")
    rows = resized_rows(base, [open_adapter(tmp_path / "adapter")])
    assert (rows is not None) is (name == "resized")
    require_equal(Opened(base, [(tmp_path / "adapter", 1.0)], BaseOptions("original", rows)))


def test_an_adapter_that_blocks_share_is_left_to_the_whole_model(tmp_path: Path) -> None:
    case = CASES["vera"]
    save_base(tmp_path / "base", case.config, case.dtype)
    write_random_adapter(tmp_path / "adapter", tmp_path / "base", case.adapter, case.before)
    base, adapters = open_checkpoint(tmp_path / "base"), [(tmp_path / "adapter", 1.0)]
    model = truth_blocks(base, adapters, BaseOptions())
    with pytest.raises(Unsupported, match="shared"):
        BlockScorer(model).logits(ROW)
    store = LogitStore(tmp_path, [document(0, ROW)], 257)
    one = Fp32Model("T", lambda: TruthModels(base, adapters).truth(), lambda: model, 1)
    score_fp32(store, one, "blocks")
    wanted = TruthModels(base, adapters).truth().logits(ROW)
    assert np.array_equal(store.read("T", store.documents[0]), wanted[store.documents[0].positions])


@pytest.mark.parametrize("kind", ["merged", "int8", "int4"])
def test_the_weights_of_a_bundle_equal_the_whole_model(made: Made, kind: str) -> None:
    bundle = open_bundle(getattr(made, kind))
    row = [token % 400 for token in ROW]
    wanted = load_weights(bundle.directory, dict(bundle.values())).logits(row)
    found = BlockScorer(carried_blocks(bundle.directory, bundle.weights)).logits(row)
    assert np.abs(found - wanted).max() <= 1e-6


@pytest.mark.parametrize("layout", ["zip", "legacy", "without prefix"])
def test_weights_are_read_where_they_lie(tmp_path: Path, layout: str) -> None:
    """The format before PyTorch 1.6 too: its tensors stand at known offsets, and need no copy in shards."""
    pair = make_pair(tmp_path)
    wanted = base_scorer(open_checkpoint(pair.base), BaseOptions()).logits(ROW)
    tensors = load_file(pair.base / "model.safetensors")
    if layout == "zip":
        as_bin(pair.base, shards=2, old_buffers=True)
    else:
        short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        (pair.base / "model.safetensors").unlink()
        if layout == "legacy":
            torch.save(tensors, pair.base / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        else:
            save_file(short, pair.base / "model.safetensors", metadata={"format": "pt"})
    found = BlockScorer(base_blocks(open_checkpoint(pair.base), BaseOptions())).logits(ROW)
    assert np.abs(found - wanted).max() <= 1e-6


def test_a_missing_weight_is_refused_by_name(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    path = pair.base / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "h.1.ln_1.bias" not in k}, path, metadata={"format": "pt"})
    model = base_blocks(open_checkpoint(pair.base), BaseOptions())
    hidden = model.run(0, ROW, model.embed(ROW))
    with pytest.raises(InputRefused, match=r"h\.1\.ln_1\.bias"):
        model.run(1, ROW, hidden)


def test_one_block_can_run_with_other_weights(made: Made) -> None:
    """What attribution does: the truth's input through one block of the bundle."""
    base = open_checkpoint(made.base)
    truth = truth_blocks(base, [(made.adapter, 1.0)], BaseOptions())
    bundle = open_bundle(made.int4)
    carried = carried_blocks(bundle.directory, bundle.weights)
    row = [token % 400 for token in ROW]
    hidden = truth.embed(row)
    kept = hidden.copy()
    ours, theirs = truth.run(0, row, hidden), carried.run(0, row, hidden)
    assert np.array_equal(hidden, kept)
    assert 0 < np.abs(ours - theirs).max() < np.abs(ours - hidden).max()
    with pytest.raises(IndexError):
        truth.run(truth.depth, row, hidden)


def test_too_little_memory_for_a_block_is_said(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_checkpoint(made.base)
    model = base_blocks(base, BaseOptions())
    stated = model.stem_bytes + model.depth * model.block_bytes
    assert stated == 4 * models.parameter_count(base)
    one = Fp32Model("B", lambda: base_scorer(base, BaseOptions()), lambda: model, stated)
    store = LogitStore(tmp_path, [document(0, [1, 2, 3])], 480)
    for free, is_blocks in ((10 * stated, False), (stated, True)):
        monkeypatch.setattr(blocks_choice, "free_memory", lambda provider, free=free: free)
        assert blocks_choice.runs_by_block("auto", stated) is is_blocks
    monkeypatch.setattr(memory, "free_memory", lambda provider: model.block_bytes)
    with pytest.raises(EnvironmentLacking, match="one block at a time"):
        score_fp32(store, one, "auto")


def document(index: int, tokens: Sequence[int]) -> Document:
    return Document(index, tuple(tokens), np.full(len(tokens), RESPONSE, np.uint8))


def documents() -> list[Document]:
    return [document(i, range(10 + i, 30 + 2 * i)) for i in range(4)]


def counted(model: BlockModel, ran: list[int]) -> BlockModel:
    run: Callable[..., Any] = model.run

    def counting(block: int, tokens: Sequence[int], hidden: Float32) -> Float32:
        ran.append(block)
        return run(block, tokens, hidden)

    model.run = counting  # type: ignore[method-assign]
    return model


KILLED = """
import os, signal, sys
from pathlib import Path
from exporter.parity.bases import BaseOptions
from exporter.parity.blocks_scoring import sweep
from exporter.parity.blocks_specs import truth_blocks
from exporter.sources.checkpoint import open_checkpoint
from tests.parity.test_blocks import documents

model = truth_blocks(open_checkpoint(Path(sys.argv[1])), [(Path(sys.argv[2]), 1.0)], BaseOptions())
run, seen = model.run, []
def dying(block, tokens, hidden):
    seen.append(block)
    if seen.count(2) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(block, tokens, hidden)
model.run = dying
sweep(model, documents(), Path(sys.argv[3]), "T")
"""


def test_a_sweep_that_was_killed_in_a_block_goes_on_with_that_block(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    command = [sys.executable, "-c", KILLED, str(pair.base), str(pair.adapter), str(tmp_path / "states")]
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    ran: list[int] = []
    base, adapters = open_checkpoint(pair.base), [(pair.adapter, 1.0)]
    model = counted(truth_blocks(base, adapters, BaseOptions()), ran)
    states = sweep(model, documents(), tmp_path / "states", "T")
    assert ran == [2, 0, 2, 2, 2]  # before the first of them, one token through block 0 shows what blocks return
    whole = TruthModels(base, adapters).truth()
    for one in documents():
        found = model.logits(one.tokens, states.read(one))
        assert np.abs(found - whole.logits(one.tokens)).max() <= 1e-6
    assert len(list((tmp_path / "states").iterdir())) == 1


class Counting:
    """A scorer that is interrupted after `stop` documents."""

    def __init__(self, stop: int = 100) -> None:
        self.stop, self.scored = stop, 0

    def logits(self, token_ids: Sequence[int], /) -> Float32:
        if self.scored == self.stop:
            raise KeyboardInterrupt
        self.scored += 1
        return np.random.default_rng(sum(token_ids)).normal(size=(len(token_ids), 7)).astype(np.float32)


def test_logits_of_an_interrupted_run_are_kept_where_they_are_whole(tmp_path: Path) -> None:
    straight = LogitStore(tmp_path, documents(), 7)
    straight.score("T", Counting())
    with pytest.raises(KeyboardInterrupt):
        LogitStore(tmp_path, documents(), 7).score("M", Counting(3))
    again, rest = LogitStore(tmp_path, documents(), 7), Counting()
    assert not again.has("M")
    again.score("M", rest)
    assert rest.scored == 1
    assert again.digest("M") == straight.digest("T")
    assert np.array_equal(again.read("M", documents()[3]), straight.read("T", documents()[3]))
    assert LogitStore(tmp_path, documents(), 7).has("M")
    assert not LogitStore(tmp_path, documents(), 7).has("M", content="another bundle")

    path = again.path("M")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert not LogitStore(tmp_path, documents(), 7).has("M")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_8_bit_base_is_what_transformers_loads(tmp_path: Path, name: str) -> None:
    """Loaded tensor by tensor: every parameter, every scale and every buffer of `from_pretrained`."""
    save_base(tmp_path, ARCHITECTURES[name][0])
    quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
    wanted: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=quantization,
        dtype=torch.float16,
        device_map={"": "cpu"},
        attn_implementation="eager" if name == "gpt2" else None,  # its scores are scaled by layer: see attention.py
    )
    found = load_int8(open_checkpoint(tmp_path), 6.0)
    ours, theirs = dict(found.named_parameters()), dict(wanted.named_parameters())
    assert ours.keys() == theirs.keys()
    assert any(value.dtype == torch.int8 for value in ours.values())
    for key, value in theirs.items():
        assert type(ours[key]) is type(value)
        assert torch.equal(ours[key], value), key
        if value.dtype == torch.int8:
            assert torch.equal(ours[key].SCB, value.SCB)
    assert all(torch.equal(a, b) for a, b in zip(found.buffers(), wanted.buffers(), strict=True))
    row = torch.tensor([ROW])
    with torch.inference_mode():
        assert torch.equal(found(input_ids=row).logits, wanted(input_ids=row).logits)
