"""Merge a PEFT adapter into its base, export it to ONNX, and prove that both still say what the 8-bit model said.

Every command is a function of the same name: `exporter.merge(base=..., adapter=..., out=...)`. Each is imported when it
is first used, since torch takes seconds to load.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.demonstration import demo as demo
    from exporter.diagnosis import doctor as doctor
    from exporter.graph.export import export as export
    from exporter.inspection import inspect as inspect
    from exporter.manifest_check import verify_manifest as verify_manifest
    from exporter.merging.merge import merge as merge
    from exporter.merging.unmerge import unmerge as unmerge
    from exporter.parity.capture import capture as capture
    from exporter.pipeline import run as run
    from exporter.runtime.generate import generate as generate
    from exporter.runtime.load import load as load
    from exporter.serving.serve import serve as serve
    from exporter.verification import verify as verify

FUNCTIONS = {
    "capture": "exporter.parity.capture",
    "demo": "exporter.demonstration",
    "doctor": "exporter.diagnosis",
    "export": "exporter.graph.export",
    "generate": "exporter.runtime.generate",
    "inspect": "exporter.inspection",
    "load": "exporter.runtime.load",
    "merge": "exporter.merging.merge",
    "run": "exporter.pipeline",
    "serve": "exporter.serving.serve",
    "unmerge": "exporter.merging.unmerge",
    "verify": "exporter.verification",
    "verify_manifest": "exporter.manifest_check",
}

__all__ = [
    "FUNCTIONS",
    "capture",
    "demo",
    "doctor",
    "export",
    "generate",
    "inspect",
    "load",
    "merge",
    "run",
    "serve",
    "unmerge",
    "verify",
    "verify_manifest",
]
__version__ = version("exporter")


def __getattr__(name: str) -> Any:
    if name in FUNCTIONS:
        return getattr(import_module(FUNCTIONS[name]), name)
    raise AttributeError(f"module 'exporter' has no attribute {name!r}")
