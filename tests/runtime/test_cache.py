"""Rows of a cache copied, exchanged and cleared: in one buffer, and where each row is an array of its own."""

import numpy as np
import pytest

from exporter.runtime.cache import CacheShape, KeyValueCache
from exporter.runtime.copying_runner import CopiedCache

SHAPE, NAMES = CacheShape(1, 2, 3, np.float32, "cpu"), ("past_key_values.0.key", "past_key_values.0.value")
Rows = list[list[np.ndarray]]


def contents(cache: KeyValueCache) -> Rows:
    """The filled slots (heads, slots, head size) of each row, key and value."""
    if isinstance(cache, CopiedCache):
        return [[past[name][0, :, :length] for name in NAMES] for past, length in zip(cache.pasts, cache.lengths)]  # noqa: B905
    return [[buffer[row, :, :length].numpy() for buffer in cache._buffers] for row, length in enumerate(cache.lengths)]


@pytest.fixture(params=["one buffer", "an array a row"])
def cache(request: pytest.FixtureRequest) -> KeyValueCache:
    """Rows of 5, 2 and 0 slots."""
    random = np.random.default_rng(0)
    cache = KeyValueCache(SHAPE, 3, 6) if request.param == "one buffer" else CopiedCache(SHAPE, 3, NAMES)
    for row, length in enumerate((5, 2, 0)):
        cache.lengths[row], cache.adapters[row] = length, f"adapter {row}"
        for i, name in enumerate(NAMES):
            values = random.normal(size=(2, length, 3)).astype(np.float32)
            if isinstance(cache, CopiedCache):
                cache.pasts[row][name] = values[None]
            else:
                cache._buffers[i][row, :, :length] = cache._buffers[i].new_tensor(values)
    return cache


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_exchanged_rows_hold_what_the_other_held(cache: KeyValueCache) -> None:
    before = [[array.copy() for array in row] for row in contents(cache)]
    cache.swap_rows(0, 1)
    cache.swap_rows(1, 2)
    after = contents(cache)
    assert cache.lengths.tolist() == [2, 0, 5]
    assert same(after[0], before[1])
    assert same(after[2], before[0])
    if not isinstance(cache, CopiedCache):  # which knows no adapters
        assert cache.adapters == ["adapter 1", "adapter 2", "adapter 0"]


def test_copied_slots_continue_a_row_and_the_source_keeps_its_own(cache: KeyValueCache) -> None:
    before = [[array.copy() for array in row] for row in contents(cache)]
    cache.copy_slots(0, 2, 0, 3)
    cache.copy_slots(0, 2, 3, 4)
    assert cache.lengths.tolist() == [5, 2, 4]
    assert same(contents(cache)[2], [array[:, :4] for array in before[0]])
    assert same(contents(cache)[0], before[0])


def test_a_cleared_row_is_empty(cache: KeyValueCache) -> None:
    cache.clear_row(0)
    assert cache.lengths.tolist() == [0, 2, 0]
    if not isinstance(cache, CopiedCache):
        assert all(not buffer[0].any() for buffer in cache._buffers)
