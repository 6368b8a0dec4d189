"""The deltas of faulty merges, row block by row block, against NumPy's own over whole arrays."""

from dataclasses import replace

import numpy as np
import pytest

from exporter.parity.elements import row_blocks
from exporter.parity.merge_mutations import merge_mutations
from exporter.parity.oracle import Adapted


def adapted(shape: tuple[int, ...], seed: int) -> Adapted:
    random = np.random.default_rng(seed)
    original, delta = random.normal(size=shape), random.normal(size=shape)
    return Adapted(f"w{seed}", original, original + delta, np.zeros(shape), (4,), (4.0,), (16.0,))


def whole(one: Adapted, other: Adapted) -> dict[str, np.ndarray]:
    """What each mutation of `one` means; those without an entry do not apply to its shape."""
    delta = one.delta
    rows, columns = delta.shape
    axis = {3 * rows: 1, rows / 3: 0}.get(columns)
    found = {
        "adapter dropped": np.zeros_like(delta),
        "scale x 0.5": 0.5 * delta,
        "scale x 0.9": 0.9 * delta,
        "scale x 2": 2 * delta,
        "alpha instead of alpha / r": 4 * delta,
        "merged twice": 2 * delta,
        "layers shuffled": other.delta,
        "rows shuffled": np.roll(delta, 1, axis=0),
    }
    if axis is not None:
        q, k, v = np.split(delta, 3, axis=axis)
        found["q, k, v swapped"] = np.concatenate([k, v, q], axis=axis)
    if rows == columns:
        found["transposed"] = delta.T
    return found


@pytest.mark.parametrize("shape", [(96, 288), (288, 96), (256, 256), (40, 1000)])
def test_every_block_of_rows_is_that_of_the_whole(shape: tuple[int, int]) -> None:
    one, other = adapted(shape, 1), adapted(shape, 2)
    expected = whole(one, other)
    blocks = list(row_blocks(one.merged))
    assert len(blocks) > 1
    for mutation in merge_mutations():
        delta = mutation.change(one, other)
        if isinstance(delta, str):
            assert mutation.name not in expected, delta
        else:
            found = np.concatenate([delta(rows) for rows in blocks])
            np.testing.assert_allclose(found, expected.pop(mutation.name), rtol=1e-12, atol=1e-12)
    assert not expected


def test_a_replaced_row_and_a_magnitude() -> None:
    exact = replace(adapted((200, 100), 3), is_exact=True)
    (reverted,) = [one for one in merge_mutations([exact]) if one.name == "one replaced row reverted"]
    delta = reverted.change(exact, None)
    assert not isinstance(delta, str)
    found = np.concatenate([delta(rows) for rows in row_blocks(exact.merged)])
    (changed,) = np.flatnonzero((found != exact.delta).any(1))
    assert changed == np.linalg.norm(exact.delta, axis=1).argmax()
    assert not found[changed].any()

    dora = replace(adapted((200, 100), 4), plain=np.full((200, 100), 7.0))
    (mutation,) = [one for one in merge_mutations([dora]) if one.name == "magnitude left out"]
    plain = mutation.change(dora, None)
    assert not isinstance(plain, str)
    np.testing.assert_array_equal(plain(slice(50, 60)), 7.0 - dora.original[50:60])
