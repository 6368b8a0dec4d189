"""What bench_decode.py compares: each contender's worker, its Python, and how its model is made from one checkpoint."""

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from make_base import SIZES

HERE = Path(__file__).parent
ROOT = HERE.parent
PEERS = ("llama-cpp-python==0.3.36", "ctranslate2==4.8.5", "gguf==0.19.0")
# Of float32 weights, that optimum's export holds at its peak: measured at 590M.
OPTIMUM_PEAK = 4


class Missing(Exception):
    """Why a contender cannot take part."""


@dataclass(frozen=True)
class Place:
    """directory: of one size, with the checkpoint in `base`. peers: the environment of other people's libraries."""

    directory: Path
    peers: Path
    threads: int

    @property
    def base(self) -> Path:
        return self.directory / "base"

    @property
    def peers_python(self) -> Path:
        return self.peers / "bin/python"


@dataclass(frozen=True)
class Entry:
    """make: the model of `flavour`, made if it is not there yet; raises Missing."""

    worker: str
    flavour: str
    make: Callable[[Place, str], Path]
    of_peers: bool = False

    def command(self, place: Place) -> list[str | Path]:
        return [place.peers_python if self.of_peers else sys.executable, HERE / f"{self.worker}.py"]


def make_checkpoint(place: Place, size: str) -> None:
    """The demo's base, a random one of Cerebras-GPT's sizes, or of a shape WIDTHxLAYERSxHEADS; float16."""
    if place.base.exists():
        return
    if size == "demo":
        shutil.copytree(ROOT / "exporter/demo/base", place.base)
        return
    shape = ["--size", size]
    if size not in SIZES:
        shape = [f"--{name}={value}" for name, value in zip(("width", "layers", "heads"), size.split("x"), strict=True)]
    run([sys.executable, HERE / "make_base.py", "--random", *shape, "--out", place.directory])


def make_bundle(place: Place, flavour: str) -> Path:
    """`flavour`: a precision, and where it is quantized a block size, int8/32. Exported anew each time: the benchmark
    is of the exporter as it is now.
    """
    precision, _, block = flavour.partition("/")
    out = place.directory / f"block{block}"
    command = [sys.executable, "-m", "exporter.cli", "export", place.base, "--quiet", "--force"]
    run([*command, "--precision", precision, *(["--block-size", block] if block else []), "--out", out])
    return out / precision if block else place.base


def make_gguf(place: Place, kind: str) -> Path:
    require_peer(place, "gguf")
    require_peer(place, "llama_cpp")
    whole, wanted = place.directory / "f32.gguf", place.directory / f"{kind}.gguf"
    script = [place.peers_python, HERE / "to_gguf.py"]
    if not whole.exists():
        run([*script, place.base, whole])
    if not wanted.exists():
        run([*script, whole, wanted, "--quantize", kind, "--threads", str(place.threads)])
    return wanted


def make_gguf_for_llama_bench(place: Place, kind: str) -> Path:
    if shutil.which("llama-bench") is None:
        raise Missing("llama-bench is not on the PATH")
    return make_gguf(place, kind)


def make_ctranslate2(place: Place, compute_type: str) -> Path:
    require_peer(place, "ctranslate2")
    wanted = place.directory / f"ctranslate2-{compute_type}"
    if not wanted.exists():
        packages = next(place.peers.glob("lib/python*/site-packages"))
        kind = compute_type.removesuffix("_float32")
        run([sys.executable, HERE / "to_ctranslate2.py", place.base, wanted, kind, packages])
    return wanted


def make_optimum(place: Place, graph: str) -> Path:
    try:
        import optimum.onnxruntime  # noqa: F401
    except ImportError as error:
        raise Missing(f"optimum-onnx cannot be imported: {error}") from error
    wanted = place.directory / "optimum"
    script = [sys.executable, HERE / "to_optimum.py", place.base, wanted]
    if not (wanted / graph).exists():
        # Stored as float16, so twice their size.
        needed = OPTIMUM_PEAK * 2 * sum(file.stat().st_size for file in place.base.glob("*.safetensors"))
        if needed > (free := psutil.virtual_memory().available):
            raise Missing(f"optimum's export needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free")
        if not wanted.exists():
            run(script)
        if not (wanted / graph).exists():
            run([*script, "--int8"])
    return wanted


def make_nothing(place: Place, flavour: str) -> Path:
    return place.base


CONTENDERS = {
    "exporter-native": Entry("decode_exporter", "native", make_bundle),
    "exporter-int8": Entry("decode_exporter", "int8/32", make_bundle),
    "exporter-int4": Entry("decode_exporter", "int4/32", make_bundle),
    "exporter-int8-block128": Entry("decode_exporter", "int8/128", make_bundle),
    "exporter-int4-block128": Entry("decode_exporter", "int4/128", make_bundle),
    "llama.cpp-f32": Entry("decode_llama", "f32", make_gguf, of_peers=True),
    "llama.cpp-f16": Entry("decode_llama", "f16", make_gguf, of_peers=True),
    "llama.cpp-q8_0": Entry("decode_llama", "q8_0", make_gguf, of_peers=True),
    "llama.cpp-q4_0": Entry("decode_llama", "q4_0", make_gguf, of_peers=True),
    "llama-bench-f32": Entry("decode_llama_bench", "f32", make_gguf_for_llama_bench),
    "llama-bench-q8_0": Entry("decode_llama_bench", "q8_0", make_gguf_for_llama_bench),
    "llama-bench-q4_0": Entry("decode_llama_bench", "q4_0", make_gguf_for_llama_bench),
    "ctranslate2-float32": Entry("decode_ctranslate2", "float32", make_ctranslate2, of_peers=True),
    "ctranslate2-int8": Entry("decode_ctranslate2", "int8_float32", make_ctranslate2, of_peers=True),
    "optimum-fp32": Entry("decode_optimum", "model.onnx", make_optimum),
    "optimum-int8": Entry("decode_optimum", "model_quantized.onnx", make_optimum),
    "optimum-over-exporter": Entry("decode_optimum", "model.onnx", lambda place, _: make_bundle(place, "native")),
    "transformers": Entry("decode_transformers", "", make_nothing),
}


def make_peers(peers: Path, wheels: Path | None, packages: Sequence[str] = PEERS) -> dict[str, str]:
    """Install what is missing. Why a package is not there, by its requirement; llama-cpp-python compiles for long."""
    python = peers / "bin/python"
    if not python.exists():
        venv.create(peers, with_pip=True)
    failures = {}
    for package in packages:
        found = [] if wheels is None else ["--find-links", wheels, "--prefer-binary"]
        try:
            run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *found, package])
        except Missing as error:
            failures[package] = str(error)
    return failures


def require_peer(place: Place, module: str) -> None:
    run([place.peers_python, "-c", f"import {module}"])


def run(command: Sequence[str | Path], feed: str = "") -> str:
    """Standard output. Missing with the end of standard error if the command fails."""
    words = [str(word) for word in command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(words, input=feed, capture_output=True, text=True, env=environment)
    except OSError as error:
        raise Missing(f"{words[0]} cannot be started: {error.strerror}") from error
    if done.returncode:
        last = " ".join(done.stderr.strip().splitlines()[-2:])[-400:]
        raise Missing(f"{Path(words[0]).name} {' '.join(words[1:3])} gave {done.returncode}: {last}")
    return done.stdout
