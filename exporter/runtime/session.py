"""Opening an ONNX Runtime session on the provider that a graph was built for."""

from pathlib import Path

import onnxruntime as ort
import torch

from exporter.errors import EnvironmentLacking, ExporterError, InputRefused, UsageError, lacking

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
FATAL_ONLY = 4  # failures come as exceptions; their log lines would only double them


def cuda_is_usable() -> bool:
    """A build with CUDA is installed and a device answers."""
    return PROVIDERS["cuda"] in ort.get_available_providers() and torch.cuda.is_available()


def provider_name(name: str) -> str:
    """cpu or cuda, from either or from onnxruntime's own name; UsageError for another."""
    short = {long: short for short, long in PROVIDERS.items()}
    if short.get(name, name) not in PROVIDERS:
        raise UsageError(f"provider {name!r}", expected="one of " + ", ".join([*PROVIDERS, *PROVIDERS.values()]))
    return short.get(name, name)


def require_provider(provider: str) -> None:
    """EnvironmentLacking when `provider` (cpu or cuda) cannot be used here."""
    if PROVIDERS[provider] not in ort.get_available_providers():
        raise EnvironmentLacking(
            f"onnxruntime {ort.__version__} was built without {PROVIDERS[provider]}",
            todo="install onnxruntime-gpu (and uninstall onnxruntime: both cannot live in one environment)",
        )
    if provider == "cuda" and not torch.cuda.is_available():
        raise EnvironmentLacking(
            f"{PROVIDERS[provider]} finds no CUDA device",
            expected="a device with its driver",
            todo="use --provider cpu",
        )


def new_session(model: Path | bytes, options: ort.SessionOptions, provider: str, shown: str) -> ort.InferenceSession:
    """A session on `provider` (cpu or cuda), with the CPU for what it lacks; `shown` names the graph in the error.

    Without onnxruntime's own second attempt on other providers, which prints to stdout, where --json's answer goes.
    """
    providers = list(dict.fromkeys([PROVIDERS[provider], PROVIDERS["cpu"]]))
    try:
        return ort.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise _cannot_open(shown, error) from error


def _cannot_open(graph: str, error: Exception) -> ExporterError:
    """What ONNX Runtime's refusal to open `graph` is: EnvironmentLacking for want of memory, else InputRefused."""
    said = str(error).splitlines()[0]
    if lacking(error):
        return EnvironmentLacking(
            f"there is not enough memory to open {graph} ({said[-200:]})",
            todo="free memory or raise the limit, or open a smaller bundle",
        )
    if "CUDA failure" in said:
        return _did_not_start(PROVIDERS["cuda"], said[:300])
    return InputRefused(
        f"ONNX Runtime cannot open {graph}: {said[:300]}",
        expected="a graph and weights as exporter wrote them",
        todo="export again",
    )


def _did_not_start(provider: str, detail: str) -> EnvironmentLacking:
    return EnvironmentLacking(
        f"{provider} did not start; {detail}",
        todo="check the CUDA libraries with exporter doctor, or use --provider cpu",
    )


def open_session(graph: Path, provider: str, threads: int | None) -> ort.InferenceSession:
    """A session on exactly `provider`. EnvironmentLacking if it falls back, InputRefused if the graph is not valid."""
    require_provider(provider)
    options = ort.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    if provider == "cuda":
        ort.preload_dlls()
    session = new_session(graph, options, provider, str(graph))
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise _did_not_start(PROVIDERS[provider], f"onnxruntime fell back to {session.get_providers()[0]}")
    return session
