"""What `exporter doctor` finds, and what it says when something is missing."""

import builtins
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from huggingface_hub import constants

from exporter import diagnosis
from exporter.diagnosis import Check, Diagnosis, doctor
from tests.hub_server import Hub, hub  # noqa: F401 (a fixture)


def by_name(found: Diagnosis) -> dict[str, Check]:
    return {check.name: check for check in found.checks}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Make `import module` fail, as on a machine that does not have it."""
    real = builtins.__import__

    def importer(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == module:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importer)


def test_this_machine_can_run() -> None:
    found = doctor()
    checks = by_name(found)
    assert found.lacking == ()
    assert found.exit_code == 0
    assert checks["torch"].detail.startswith(torch.__version__)
    assert checks["onnxruntime"].detail.endswith(onnxruntime.__version__)
    assert "one-node session runs" in checks["CPUExecutionProvider"].detail
    assert {"python", "transformers", "peft", "bitsandbytes", "memory", "disk", "hub", "optimum"} <= set(checks)


def test_every_available_provider_is_tried() -> None:
    providers = set(onnxruntime.get_available_providers()) - {"TensorrtExecutionProvider"}
    checks = by_name(doctor())
    assert providers <= set(checks)
    if not torch.cuda.is_available():
        assert not checks["CUDAExecutionProvider"].ok
        assert checks["CUDAExecutionProvider"].needed_by == ("export --target cuda",)


def test_the_document_is_json() -> None:
    document = json.loads(json.dumps(doctor().to_dict()))
    assert document["exit_code"] == 0
    assert all({"name", "ok", "detail", "needed_by", "todo"} == set(check) for check in document["checks"])


def test_a_missing_bitsandbytes_names_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "bitsandbytes")
    found = doctor()
    assert found.exit_code == 5
    (check,) = found.lacking
    assert (check.name, check.needed_by) == ("bitsandbytes", ("verify",))
    assert ".[int8]" in check.todo


def test_an_8_bit_layer_that_did_not_quantize_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    class Dense(torch.nn.Linear):
        def __init__(self, *sizes: int, **_: object) -> None:
            super().__init__(*sizes, bias=False)

    monkeypatch.setattr(bitsandbytes.nn, "Linear8bitLt", Dense)
    check = by_name(doctor())["bitsandbytes"]
    assert not check.ok
    assert "0.00%" in check.detail


def test_both_onnxruntimes_are_a_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.31.1")
    found = doctor()
    assert found.exit_code == 5
    assert by_name(found)["onnxruntime"].detail == "onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are both installed"


def test_a_session_that_fails_or_errs_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    class Session:
        def __init__(self, *_: object, **__: object) -> None:
            raise RuntimeError("illegal instruction\nmore")

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    found = doctor()
    assert found.exit_code == 5
    assert by_name(found)["CPUExecutionProvider"].detail == "RuntimeError: illegal instruction"


def test_no_optimum_hinders_only_its_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    real = diagnosis._version
    monkeypatch.setattr(diagnosis, "_version", lambda name: None if name.startswith("optimum") else real(name))
    found = doctor()
    assert found.exit_code == 0
    assert not by_name(found)["optimum"].ok


def test_a_hub_is_reached_offline_or_unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    assert by_name(doctor())["hub"].detail == f"{hub.url} answers"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in by_name(doctor())["hub"].detail
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    found = doctor()
    assert "Connection refused" in by_name(found)["hub"].detail
    assert found.exit_code == 0


def test_it_leaves_the_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    doctor()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_libraries_write_nothing_of_their_own() -> None:
    program = "from exporter.diagnosis import doctor; doctor()"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
