"""Synthetic bases load everywhere, and the widened demo pair says what the demo pair says."""

import hashlib
import json
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporter.demonstration import PAIR
from exporter.sources.checkpoint import open_checkpoint, read_headers
from exporter.sources.values import read_tensor
from tests.pairs import Pair

SCRIPT = Path(__file__).parents[2] / "benchmarks/make_base.py"
TINY = ("--random", "--width", "48", "--layers", "2", "--heads", "4")
# heads of 48 channels hold the demo's 32 unevenly: half of them stand twice
WIDE = ("--from-demo", "--width", "384", "--layers", "14", "--heads", "8", "--dtype", "float32")
KINDS = {
    "safetensors": (*TINY, "--dtype", "float16"),
    "bin": (*TINY, "--dtype", "float16", "--format", "bin"),
    "old": (*TINY, "--format", "bin", "--shard-size", "5MB", "--old-buffers", "--fan-in-fan-out", "true"),
    "float32": (*TINY, "--dtype", "float32", "--shard-size", "0.01GB", "--adapter-format", "bin"),
    "demo": WIDE,
}


def make(out: Path, *arguments: str) -> int:
    """Run the script in this process, which has paid for importing torch. Returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        patch.setattr(sys, "argv", [str(SCRIPT), *arguments, "--out", str(out)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def make_apart(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    made = {}
    for kind, arguments in KINDS.items():
        out = tmp_path_factory.mktemp(kind)
        assert make(out, *arguments) == 0
        made[kind] = Pair(out / "base", out / "adapter")
    return made


def values(directory: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(info) for name, info in open_checkpoint(directory).tensors.items()}


def load(pair: Pair, *, adapter: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, str(pair.adapter)) if adapter else model).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_every_tensor(pairs: dict[str, Pair], kind: str) -> None:
    both: Any = AutoModelForCausalLM.from_pretrained(pairs[kind].base, dtype="auto", output_loading_info=True)
    model, report = both
    assert not any(report[found] for found in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = values(pairs[kind].base)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            assert torch.equal(tensor, stored[name]), name
    assert AutoTokenizer.from_pretrained(pairs[kind].base)("a b")["input_ids"] == [64, 275]


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_every_factor_and_none_is_zero(pairs: dict[str, Pair], kind: str) -> None:
    config = json.loads((pairs[kind].adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 16, ["c_attn"])
    assert config["enable_lora"] is None
    assert config["merge_weights"] is False
    assert config["fan_in_fan_out"] is (kind == "old")
    (file,) = pairs[kind].adapter.glob("adapter_model.*")
    model = load(pairs[kind], adapter=True)
    loaded = {name.replace(".default", ""): value for name, value in model.named_parameters() if "lora_" in name}
    stored = {name: read_tensor(info) for name, info in read_headers(file).items()}
    assert set(stored) == set(loaded)
    assert all(torch.equal(stored[name], loaded[name]) and stored[name].all() for name in stored)


def test_bin_files_are_what_torch_save_writes(pairs: dict[str, Pair]) -> None:
    base = pairs["old"].base
    files = sorted(base.glob("*.bin"))
    assert [file.name for file in files] == [f"pytorch_model-{n:05d}-of-{len(files):05d}.bin" for n in (1, 2, 3)]
    stored = values(base)
    for file in files:
        loaded = torch.load(file, weights_only=True, mmap=True)
        assert all(torch.equal(tensor, stored[name]) for name, tensor in loaded.items())
        assert all(info.offset % 64 == 0 for info in read_headers(file).values())
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
    assert stored["transformer.h.1.attn.bias"].sum() == 2048 * 2049 / 2
    index = json.loads((base / "pytorch_model.bin.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())


def test_formats_hold_equal_values_and_no_two_tensors_are_equal(pairs: dict[str, Pair]) -> None:
    base, other, old = (values(pairs[kind].base) for kind in ("safetensors", "bin", "old"))
    assert all(torch.equal(tensor, other[name]) and torch.equal(tensor, old[name]) for name, tensor in base.items())
    digests = {hashlib.sha256(tensor.numpy().tobytes()).digest() for tensor in base.values()}
    assert len(digests) == len(base)


def test_equal_arguments_give_equal_bytes_and_another_seed_does_not(pairs: dict[str, Pair], tmp_path: Path) -> None:
    for kind, arguments in (("safetensors", TINY), ("demo", WIDE)):
        done = make_apart(tmp_path / kind, *arguments)
        assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
        for made in sorted((tmp_path / kind).rglob("*.*")):
            first = pairs[kind].base.parent / made.relative_to(tmp_path / kind)
            assert made.read_bytes() == first.read_bytes(), made.name
    assert make(tmp_path / "seed", *TINY, "--seed", "1") == 0
    before, after = values(pairs["safetensors"].base), values(tmp_path / "seed/base")
    assert not any(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_few_channels_of_random_bases_exceed_six(pairs: dict[str, Pair]) -> None:
    model, columns = load(pairs["safetensors"], adapter=False), []
    for module in (model.transformer.h[1].attn.c_attn, model.transformer.h[1].mlp.c_fc):
        module.register_forward_pre_hook(lambda _, inputs: columns.append((inputs[0].abs() > 6).any(1).sum().item()))
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(64)[None]).logits).all()
    assert columns == [6, 6]


@pytest.mark.parametrize("adapter", [False, True])
def test_the_widened_demo_says_what_the_demo_says(pairs: dict[str, Pair], adapter: bool) -> None:
    ids = torch.randint(0, 50257, (2, 512), generator=torch.Generator().manual_seed(0))
    demo = Pair(PAIR / "base", PAIR / "adapter")
    with torch.no_grad():
        expected = load(demo, adapter=adapter)(ids).logits
        found = load(pairs["demo"], adapter=adapter)(ids).logits
    assert (found - expected).abs().max() < 1e-3
    if adapter:  # and the adapter is not idle
        assert (load(demo, adapter=False)(ids[:, :64]).logits - expected[:, :64]).abs().max() > 1


def test_copies_of_a_channel_have_weights_of_their_own(pairs: dict[str, Pair]) -> None:
    stored, demo = values(pairs["demo"].base), values(PAIR / "base")
    for part in ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"):
        wide, small = stored[f"transformer.h.0.{part}"], demo[f"transformer.h.0.{part}"].float()
        rows = len(small)
        assert not any(torch.equal(wide[:rows], wide[at : at + rows]) for at in (rows, 2 * rows))
        if part != "attn.c_attn.weight":  # its queries are scaled
            assert float(wide.std()) == pytest.approx(float(small.std()) / 3**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from-demo", "--width", "200", "--layers", "12", "--heads", "4"), "not a multiple of 128"),
        (("--from-demo", "--width", "256", "--layers", "11", "--heads", "4"), "fewer than 12"),
        (("--from-demo", "--width", "256", "--layers", "12", "--heads", "16"), "16 heads of 16 channels"),
        (("--random", "--width", "50", "--layers", "2", "--heads", "4"), "not a multiple of 4 heads"),
        (("--random", "--width", "48"), "give --size"),
        (("--random", "--size", "6.7B", "--shard-size", "large"), "shard-size"),
    ],
)
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert make(tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_left_alone(pairs: dict[str, Pair], capsys: pytest.CaptureFixture[str]) -> None:
    assert make(pairs["safetensors"].base.parent, *TINY) == 2
    assert "exists" in capsys.readouterr().err
