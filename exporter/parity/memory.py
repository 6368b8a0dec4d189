"""Memory that is asked for before a model is loaded."""

from exporter.errors import EnvironmentLacking
from exporter.files import human_bytes
from exporter.runtime.memory import free_memory

OVERHEAD = 1.15  # of a model's weights: activations, and a tensor twice while it is converted


def require_memory(needed: float, purpose: str) -> None:
    """EnvironmentLacking before loading what would not fit."""
    free = free_memory("cpu")
    if needed > free:
        raise EnvironmentLacking(
            f"{purpose} needs about {human_bytes(needed)} of memory, and {human_bytes(free)} are free",
            todo="free memory, or use a machine with more",
        )
