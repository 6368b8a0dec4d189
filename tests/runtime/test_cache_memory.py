"""What a cache costs before it is filled."""

from pathlib import Path

import numpy as np

from exporter.runtime.cache import CacheShape, KeyValueCache


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_row_costs_what_is_written_in_it() -> None:
    """Two layers of 6.7B's shape, 16 rows: 2.1 GB if all of it were taken, 134 MB for one whole row."""
    shape = CacheShape(layers=2, heads=32, head_size=128, dtype=np.float32, device="cpu")
    before = resident()
    cache = KeyValueCache(shape, rows=16, capacity=2048)
    for buffer in cache._buffers:
        buffer[3, :, :20] = 1
    assert resident() - before < 10_000_000
    assert float(cache._buffers[0][3, :, 20:].abs().max()) == 0
