"""What cannot be right is refused by name: one message that says what was seen and what is supported, and its code."""

import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter import cli
from exporter.graph.config_values import ACTIVATIONS
from exporter.graph.export import export
from exporter.runtime.session import cuda_is_usable
from tests.graph.conftest import save_byte_tokenizer, tiny_model
from tests.pairs import edit_json

NEEDS_NO_GPU = pytest.mark.skipif(cuda_is_usable(), reason="a CUDA device is here")


class Command:
    """The command line, called in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def refused(self, *arguments: object, code: int) -> str:
        """Its one message when it ends with `code`: behind lines of progress; nothing on stdout, and no traceback."""
        self._monkeypatch.setattr(sys, "argv", ["exporter", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        out, said = self._capsys.readouterr()
        assert (done.value.code, out) == (code, ""), said
        assert said.count("error: ") == 1
        assert "Traceback" not in said
        return said[said.index("error: ") :]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    before = dict(os.environ)
    with warnings.catch_warnings():
        yield Command(monkeypatch, capsys)
    logging.disable(logging.NOTSET)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 32 positions that is exported."""
    directory = tmp_path_factory.mktemp("good") / "merged"
    tiny_model(directory)
    save_byte_tokenizer(directory)
    export(directory)
    return directory


@pytest.fixture
def checkpoint(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "merged")


def test_the_good_one_is_not_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the refusals below would say nothing."""
    monkeypatch.setattr(
        sys, "argv", ["exporter", "generate", str(checkpoint), "--prompt", "Hi", "--max-new-tokens", "3"]
    )
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 0
    logging.disable(logging.NOTSET)


def test_an_unknown_architecture(command: Command, checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", model_type="mamba")
    said = command.refused("export", checkpoint, code=4)
    assert "'mamba'" in said
    assert "gpt2 (GPT-2, Cerebras-GPT)" in said
    assert "--builder optimum" in said


def test_an_unknown_activation(command: Command, checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", activation_function="mish")
    said = command.refused("export", checkpoint, code=4)
    assert "'mish'" in said
    assert all(name in said for name in ACTIVATIONS)


def test_directories_that_are_no_checkpoint(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file")
    assert "config.json is missing" in command.refused("export", tmp_path / "empty", code=4)
    assert "is not a directory" in command.refused("export", tmp_path / "file", code=4)
    assert "is not a directory" in command.refused("export", tmp_path / "nowhere", code=4)
    assert "no exported graph" in command.refused("generate", tmp_path / "empty", "--prompt", "a", code=4)
    assert "is not a directory" in command.refused("generate", tmp_path / "nowhere", "--prompt", "a", code=4)
    (checkpoint / "model.safetensors").unlink()
    said = command.refused("export", checkpoint, code=4)
    assert "no weights in" in said
    assert "model.safetensors, pytorch_model.bin, or shards with an index" in said


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "weights.safetensors"])
def test_an_adapter_or_a_bundle_is_no_checkpoint(command: Command, checkpoint: Path, name: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    assert "a quantized bundle or an adapter is not a checkpoint" in command.refused("export", checkpoint, code=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "'wte.weight' has shape (257, 64)\nexpected: (300, 64), as config.json says"),
        ({"n_positions": 64}, "'wpe.weight' has shape (32, 64)\nexpected: (64, 64), as config.json says"),
        ({"n_embd": 32}, "'wte.weight' has shape (257, 64)\nexpected: (257, 32), as config.json says"),
        ({"n_inner": 100}, "'h.0.mlp.c_fc.weight' has shape (64, 256)\nexpected: (64, 100)"),
        ({"n_layer": 3}, "'h.2.ln_1.weight' is missing"),
        ({"n_layer": 1}, "does not have, such as 'h.1."),
        ({"n_head": 3}, "n_embd 64 over n_head 3"),
    ],
)
def test_shapes_that_contradict_the_configuration(
    command: Command, checkpoint: Path, changes: dict[str, int], message: str
) -> None:
    edit_json(checkpoint / "config.json", **changes)
    assert message in command.refused("export", checkpoint, code=4)
    if "n_head" not in changes:  # changed behind the bundle's back
        assert message in command.refused("generate", checkpoint, "--prompt", "a", code=4)


@pytest.mark.parametrize("precision", ["native", "fp16", "int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(command: Command, checkpoint: Path, precision: str, value: float) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["transformer.h.1.mlp.c_fc.weight"][7, 9] = value
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    (checkpoint / "model.onnx").unlink()
    said = command.refused("export", checkpoint, "--precision", precision, code=4)
    assert said.startswith("error: 'transformer.h.1.mlp.c_fc.weight'")
    assert "NaN" in said
    assert "finite weights" in said
    assert not (checkpoint / "model.onnx").exists()
    assert not (checkpoint.parent / precision).exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_that_are_not_finite(command: Command, checkpoint: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    tensors["transformer.ln_f.bias"][-1] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
    assert "'transformer.ln_f.bias'" in command.refused("export", checkpoint, code=4)


def test_weights_changed_since_the_export(command: Command, checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    said = command.refused("generate", checkpoint, "--prompt", "a", code=4)
    assert "model.safetensors is not the file that was exported" in said
    assert "the size and hash that exporter.json lists" in said
    path.write_bytes(data[:-4])
    assert "model.safetensors" in command.refused("generate", checkpoint, "--prompt", "a", code=4)


def test_a_prompt_longer_than_the_context(command: Command, checkpoint: Path) -> None:
    said = command.refused("generate", checkpoint, "--prompt", "x" * 33, code=2)
    assert "33 tokens\nexpected: at most 32 (n_positions)\nwhat to do: shorten the prompt" in said
    assert "at least one token" in command.refused("generate", checkpoint, "--prompt", "", code=2)


@NEEDS_NO_GPU
def test_a_provider_without_a_device(command: Command, checkpoint: Path) -> None:
    said = command.refused("generate", checkpoint, "--prompt", "a", "--provider", "cuda", code=5)
    assert "CUDAExecutionProvider" in said
    assert "what to do: " in said


def test_a_provider_that_is_not_installed(command: Command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    arguments = ("generate", checkpoint, "--prompt", "a", "--provider", "CUDAExecutionProvider")
    said = command.refused(*arguments, code=5)
    assert "was built without CUDAExecutionProvider" in said
    assert "install onnxruntime-gpu" in said


def test_a_provider_that_falls_back_is_not_used(
    command: Command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime only logs that CUDA's libraries are missing, and goes on without: that must not pass for CUDA."""
    monkeypatch.setattr("exporter.runtime.session.require_provider", lambda provider: None)
    monkeypatch.setattr("exporter.runtime.load.require_provider", lambda provider: None)
    monkeypatch.setattr("exporter.runtime.load.free_memory", lambda provider: 1 << 40)
    monkeypatch.setattr("exporter.runtime.session.PROVIDERS", {"cpu": "CPUExecutionProvider", "cuda": "NoSuchProvider"})
    monkeypatch.setattr(ort, "preload_dlls", lambda: None)
    monkeypatch.setattr(ort, "InferenceSession", fallen_back)
    export(checkpoint, target=["cuda"])
    said = command.refused("generate", checkpoint, "--prompt", "a", "--provider", "cuda", code=5)
    assert "NoSuchProvider did not start; onnxruntime fell back to CPUExecutionProvider" in said


SESSION = ort.InferenceSession


def fallen_back(
    graph: Path, options: ort.SessionOptions, providers: list[str], enable_fallback: int
) -> ort.InferenceSession:
    return SESSION(graph, options, providers=["CPUExecutionProvider"], enable_fallback=enable_fallback)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "env.cc:327 pthread_create failed, error code: 11 error msg: Resource temporarily unavailable",
            "enough memory",
        ),
        ("CUDA failure 100: no CUDA-capable device is detected", "CUDAExecutionProvider did not start"),
    ],
)
def test_a_session_that_fails_is_not_tried_on_other_providers(
    command: Command,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: str,
    said: str,
) -> None:
    """onnxruntime's second attempt would say so on stdout, before --json's answer, and run elsewhere than was asked."""

    def fails(self: ort.InferenceSession, *arguments: object) -> None:
        raise RuntimeError(error)

    monkeypatch.setattr(ort.InferenceSession, "_create_inference_session", fails)
    export(checkpoint)
    assert said in command.refused("generate", checkpoint, "--prompt", "a", "--json", code=5)


def test_an_unknown_provider(command: Command, checkpoint: Path) -> None:
    said = command.refused("generate", checkpoint, "--prompt", "a", "--provider", "tpu", code=2)
    assert "'tpu'" in said
    assert "cpu, cuda, CPUExecutionProvider, CUDAExecutionProvider" in said


def test_an_unknown_adapter(command: Command, checkpoint: Path) -> None:
    said = command.refused("generate", checkpoint, "--prompt", "a", "--adapter", "poet", code=2)
    assert "no adapter 'poet'" in said
    assert "--adapters separate" in said


def test_separate_adapters_with_a_checkpoint(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    command.refused("export", checkpoint, "--adapters", "separate", "--out", tmp_path / "out", code=2)
    said = command.refused("export", "--base", checkpoint, "--adapters", "separate", "--out", tmp_path / "out", code=2)
    assert "no adapter" in said
    assert "no checkpoint to export" in command.refused("export", code=2)
    assert "beside --base" in command.refused("export", checkpoint, "--base", checkpoint, code=2)


def test_a_manifest_that_lists_no_hash(command: Command, checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "exporter.json").read_bytes())
    del manifest["stages"]["export-native-cpu"]["files"]["model.safetensors"]
    edit_json(checkpoint / "exporter.json", **manifest)
    said = command.refused("generate", checkpoint, "--prompt", "a", code=4)
    assert "model.safetensors is not the file that was exported" in said
