"""`exporter demo`: the whole path on the packaged pair, a small trained base and a LoRA adapter for it."""

from collections.abc import Sequence
from pathlib import Path

from exporter.errors import EnvironmentLacking
from exporter.pipeline import RunResult, run
from exporter.progress import SILENT, Progress

PAIR = Path(__file__).parent / "demo"


def demo(
    *,
    out: str | Path = "artifacts/demo",
    precision: Sequence[str] = ("native", "int8"),
    target: Sequence[str] = ("cpu",),
    level: str = "commit",
    force: bool = False,
    progress: Progress = SILENT,
) -> RunResult:
    """Run every stage on the packaged pair into `out`. Raises EnvironmentLacking where the pair is not installed."""
    if not (PAIR / "base" / "model.safetensors").is_file():
        raise EnvironmentLacking(f"the demo pair is not in {PAIR}", todo="install exporter again, from a whole clone")
    return run(
        base=PAIR / "base",
        adapter=PAIR / "adapter",
        out=out,
        precision=precision,
        target=target,
        template="alpaca",
        level=level,
        force=force,
        progress=progress,
    )
