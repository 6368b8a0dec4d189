"""What is exported from a base and its adapters, unmerged."""

from dataclasses import dataclass
from pathlib import Path

INT8_EXACT = "int8-exact"  # a precision that only exists with the base and its adapters apart


@dataclass(frozen=True, slots=True)
class Parts:
    """The base and its adapters (directories or hub ids, one or more), and how and where they become a bundle."""

    base: str | Path
    adapters: tuple[str | Path, ...]
    out: Path
    precision: str
    block_size: int
    force: bool
