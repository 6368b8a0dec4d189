"""The compiled loops: numpy's own float16, sums of numpy's, and no byte that depends on how the work is cut."""

from typing import Any

import numpy as np
import pytest
import torch

from exporter.graph import quantize, quantize_kernel
from exporter.graph.quantize import REACH, quantize_matrix
from exporter.graph.quantize_kernel import compiled, quantize_tile, round_to_half

BITS = (8, 4)


def every_half_and_its_neighbours() -> np.ndarray:
    """All of float16, the middles between two, and the float32 on both sides of each."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    ordered = np.unique(halves[np.isfinite(halves)])
    middles = (ordered[1:] + ordered[:-1]) / 2
    beyond = np.array([65520, 65519.996, 1e30, np.inf, np.nan, 1e-45], np.float32)
    exact = np.concatenate([halves, middles, beyond, -beyond])
    with np.errstate(invalid="ignore"):
        sides = [np.nextafter(exact, np.float32(side)) for side in (np.inf, -np.inf)]
    return np.concatenate([exact, *sides])


def test_rounding_is_numpys_float16() -> None:
    values = every_half_and_its_neighbours()
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16).astype(np.float32)
    round_to_half(values)
    np.testing.assert_array_equal(values, expected)


def by_numpy(blocks: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The same search by whole arrays in float64, over float32 blocks (n, block): codes from 0 on, and scales."""
    half = 1 << (bits - 1)
    wide = blocks.astype(np.float64)
    extreme = wide[np.arange(len(wide)), np.abs(wide).argmax(1)]
    best, least = np.ones(len(wide)), np.full(len(wide), np.inf)
    for reach in REACH[bits]:
        codes = np.clip(np.rint(wide * (-reach / extreme)[:, None]), -half, half - 1)
        scale = ((wide * codes).sum(1) / (codes**2).sum(1)).astype(np.float16).astype(np.float64)
        error = ((codes * scale[:, None] - wide) ** 2).sum(1)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return np.clip(np.rint(wide / best[:, None]), -half, half - 1) + half, best


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [32, 64, 128, 256])
def test_codes_and_scales_are_those_of_a_search_by_numpy(bits: int, block: int) -> None:
    """But for a few scales: float32's sums and quotients round otherwise than float64's."""
    blocks = np.random.default_rng(bits * block).standard_t(5, (3000, block)).astype(np.float32)
    codes = torch.empty(3000, 1, block * bits // 8, dtype=torch.uint8)
    scales = torch.empty(3000, 1, dtype=torch.float16)
    quantize_matrix(torch.from_numpy(blocks).T, bits, codes, scales)
    expected_codes, expected_scales = by_numpy(blocks, bits)
    packed = codes.numpy()[:, 0]
    found = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(3000, block)
    same = scales.numpy()[:, 0] == expected_scales
    assert same.mean() > 0.97
    assert (found[same] == expected_codes[same]).mean() > 0.9999


@pytest.mark.parametrize("bits", BITS)
def test_the_size_of_the_tiles_changes_no_byte(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(150, 301, generator=torch.Generator().manual_seed(1)).half()
    found = []
    for tile, columns in ((1 << 17, 1 << 12), (1 << 8, 7), (1 << 12, 100)):
        monkeypatch.setattr(quantize, "TILE", tile)
        monkeypatch.setattr(quantize, "TILE_COLUMNS", columns)
        codes, scales = torch.zeros(301, 5, 4 * bits, dtype=torch.uint8), torch.zeros(301, 5, dtype=torch.float16)
        quantize_matrix(matrix, bits, codes, scales)
        found.append((codes, scales))
    assert all(torch.equal(codes, found[0][0]) and torch.equal(scales, found[0][1]) for codes, scales in found)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 6e4 * 128])
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 17, 130), (1, 31, 299)])
def test_one_value_without_a_scale_is_found_wherever_it_is(value: float, place: tuple[int, int, int]) -> None:
    values = np.random.default_rng(0).normal(size=(2, 32, 300)).astype(np.float32)
    words, scales = np.zeros((300, 2, 8), np.uint32), np.zeros((300, 2), np.float32)
    reaches, limit = np.array(REACH[8], np.float32), np.float32(6e4 * 128)
    assert quantize_tile(values, reaches, 8, limit, words, scales)
    values[place] = value
    assert not quantize_tile(values, reaches, 8, limit, words, scales)


def test_without_room_for_the_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_kernel, "ROOM", 1 << 60)
    with pytest.raises(MemoryError, match="to compile"):
        compiled("float32(float32)")


def test_without_a_place_for_the_compiled_code_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    njit: Any = quantize_kernel.njit

    def nowhere(signature: str, *, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(signature, **options)

    monkeypatch.setattr(quantize_kernel, "njit", nowhere)
    assert compiled("float32(float32)")(lambda value: value + np.float32(1))(np.float32(2)) == 3
