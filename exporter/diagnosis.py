"""What this machine has and lacks, found by trying each part on something tiny."""

import logging
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from exporter.errors import EnvironmentLacking
from exporter.files import human_bytes, nearest_existing

HUB_TIMEOUT_SECONDS = 3.0
OLDEST_PYTHON = (3, 11)
ALL = ("merge", "export", "verify")  # the stages of `run`
PACKAGES = {
    "transformers": ALL,
    "safetensors": ALL,
    "tokenizers": ALL,
    "huggingface_hub": ALL,
    "onnx": ("export",),
    "onnx_ir": ("export",),
    "numba": ("export",),
    "peft": ("verify",),
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried. `needed_by` are the stages that lack it; empty means nobody has to have it."""

    name: str
    ok: bool
    detail: str
    needed_by: tuple[str, ...] = ()
    todo: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    checks: tuple[Check, ...]

    @property
    def lacking(self) -> tuple[Check, ...]:
        """What `run` needs and does not find here."""
        return tuple(check for check in self.checks if not check.ok and set(ALL) & set(check.needed_by))

    @property
    def exit_code(self) -> int:
        return EnvironmentLacking.exit_code if self.lacking else 0

    def to_dict(self) -> dict[str, Any]:
        return {"exit_code": self.exit_code, "checks": [asdict(check) for check in self.checks]}


def doctor(directory: Path = Path()) -> Diagnosis:
    """Try everything that the stages need. `directory` is where output would go. Never raises for what is missing."""
    # At import, bitsandbytes tells on stderr how to get a 4-bit kernel that nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    probes: list[Callable[[], Check]] = [_python, _torch]
    probes += [partial(_import, name, stages) for name, stages in PACKAGES.items()]
    probes += [_onnxruntime_clash, _optimum, _bitsandbytes, _memory, lambda: _disk(directory), _hub]
    return Diagnosis((*(probe() for probe in probes), *_providers()))


def _failure(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}"[:300]


def _python() -> Check:
    wanted = ".".join(map(str, OLDEST_PYTHON))
    ok = sys.version_info >= OLDEST_PYTHON
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Check("python", ok, detail, ALL, "" if ok else f"install Python {wanted} or later")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _import(module: str, stages: tuple[str, ...]) -> Check:
    try:
        found = import_module(module)
    except Exception as error:  # a broken installation raises anything at import
        return Check(module, False, _failure(error), stages, "install with `make setup`")
    return Check(module, True, _version(module.replace("_", "-")) or str(found.__name__), stages)


def _torch() -> Check:
    stages = ALL
    try:
        import torch

        value = torch.ones(2, 3) @ torch.ones(3, 2)
        if value.sum().item() != 12:
            return Check("torch", False, "a 2 x 3 product is wrong", stages, "reinstall torch")
        detail = f"{torch.__version__}, {torch.get_num_threads()} threads, {_device(torch)}"
    except Exception as error:
        return Check("torch", False, _failure(error), stages, "install with `make setup`")
    return Check("torch", True, detail, stages)


def _device(torch: Any) -> str:
    if not torch.cuda.is_available():
        return "CPU only"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {human_bytes(free)} of {human_bytes(total)} free"


def _onnxruntime_clash() -> Check:
    found = {name: _version(name) for name in ("onnxruntime", "onnxruntime-gpu")}
    there = [f"{name} {version}" for name, version in found.items() if version]
    stages = ("export", "verify")
    if len(there) == 2:
        todo = "pip uninstall -y onnxruntime onnxruntime-gpu, then `make setup`: both write the same files"
        return Check("onnxruntime", False, f"{' and '.join(there)} are both installed", stages, todo)
    if not there:
        return Check("onnxruntime", False, "not installed", stages, "install with `make setup`")
    return Check("onnxruntime", True, there[0], stages)


def _optimum() -> Check:
    version = _version("optimum-onnx")
    if version:
        return Check("optimum", True, f"optimum {_version('optimum')}, optimum-onnx {version}")
    todo = 'pip install -c constraints.txt -e ".[optimum]" for `export --builder optimum`'
    return Check("optimum", False, "optimum-onnx is not installed", ("export --builder optimum",), todo)


def _bitsandbytes() -> Check:
    stages, todo = ("verify",), 'pip install -c constraints.txt -e ".[int8]", or capture the 8-bit reference elsewhere'
    try:
        import bitsandbytes
        import torch

        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            weight, x = torch.randn(32, 64), torch.randn(4, 64)
            linear = bitsandbytes.nn.Linear8bitLt  # pyright: ignore[reportPrivateImportUsage]
            layer = linear(64, 32, bias=False, has_fp16_weights=False, threshold=6.0)
            layer.load_state_dict({"weight": weight})
            exact = x @ weight.T
            error = ((layer.to("cpu")(x).float() - exact).norm() / exact.norm()).item()
    except Exception as error:  # a library built for another CPU or CUDA fails in its own ways
        return Check("bitsandbytes", False, _failure(error), stages, todo)
    # Rounding to 8 bits costs about 1 %; a layer that was not quantized would show nothing, a broken one far more.
    ok = 1e-4 < error < 0.05
    detail = f"{bitsandbytes.__version__}, an 8-bit layer on the CPU is off by {error:.2%}"
    return Check("bitsandbytes", ok, detail, stages, "" if ok else todo)


def _memory() -> Check:
    try:
        import psutil
    except ImportError as error:
        return Check("memory", False, _failure(error), ALL, "install with `make setup`")
    memory = psutil.virtual_memory()
    return Check("memory", True, f"{human_bytes(memory.available)} of {human_bytes(memory.total)} available")


def _disk(directory: Path) -> Check:
    place = nearest_existing(directory)
    return Check("disk", True, f"{human_bytes(shutil.disk_usage(place).free)} free in {place}")


def _hub() -> Check:
    """Unreachable is no failure: directories and cached snapshots need no hub."""
    try:
        from huggingface_hub import constants
        from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
        from huggingface_hub.utils import get_session  # pyright: ignore[reportPrivateImportUsage]

        from exporter.sources.hub import root_cause
    except ImportError as error:
        return Check("hub", False, _failure(error), (), "install with `make setup`")
    if constants.HF_HUB_OFFLINE:
        return Check("hub", True, f"HF_HUB_OFFLINE is set: only directories and the cache {constants.HF_HUB_CACHE}")
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
    except (OSError, HTTPError) as error:
        todo = "name directories instead of hub ids, or set HF_ENDPOINT to a mirror"
        return Check("hub", False, f"{constants.ENDPOINT} cannot be reached: {root_cause(error)}", (), todo)
    return Check("hub", True, f"{constants.ENDPOINT} answers")


def _providers() -> tuple[Check, ...]:
    """A session of one node on every provider that this build of ONNX Runtime offers; `run` needs only the CPU's."""
    try:
        import onnxruntime

        graph = _one_node()
        names = [name for name in onnxruntime.get_available_providers() if name != "TensorrtExecutionProvider"]
        # What goes wrong stands in the check; ONNX Runtime would write it to stderr too (its default severity is 2).
        onnxruntime.set_default_logger_severity(4)
        try:
            return tuple(_provider(onnxruntime, graph, name) for name in sorted(names))
        finally:
            onnxruntime.set_default_logger_severity(2)
    except Exception as error:
        detail = _failure(error)
    return (Check("CPUExecutionProvider", False, detail, ("export", "verify"), "install with `make setup`"),)


def _provider(onnxruntime: Any, graph: bytes, name: str) -> Check:
    import numpy as np

    stages, todo = ("export", "verify"), "reinstall onnxruntime-gpu"
    if name != "CPUExecutionProvider":
        stages, todo = ("export --target cuda",), "nothing without a GPU; else install the CUDA libraries it wants"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=[name], enable_fallback=0)
        if name not in session.get_providers():
            detail = "no session: the device or one of its libraries is missing"
            return Check(name, False, detail, stages, todo)
        (result,) = session.run(None, {"x": np.array([1.0, 2.0], np.float32)})
    except Exception as error:
        return Check(name, False, _failure(error), stages, todo)
    ok = result.tolist() == [2.0, 4.0]
    detail = "a one-node session runs" if ok else f"a one-node session gave {result.tolist()} for [2, 4]"
    return Check(name, ok, detail, stages, "" if ok else todo)


def _one_node() -> bytes:
    from onnx import TensorProto, helper

    kind = TensorProto.FLOAT
    node = helper.make_node("Add", ["x", "x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, kind, [2]) for name in "xy")
    graph = helper.make_graph([node], "one_node", [x], [y])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString()
