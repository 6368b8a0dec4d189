"""The weights a graph points at: tensors as stored, or block-quantized ones."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.errors import InputRefused
from exporter.sources.checkpoint import TensorInfo, read_tensor
from exporter.sources.safetensors_file import read_header
from exporter.sources.tensors import FLOATS

WEIGHTS = "weights.safetensors"
# Beside the codes `wte.weight.int8` stand `wte.weight.int8.scales` and perhaps `.zero_points`; a `t` after the bits
# says that the checkpoint stores the transpose.
CODES = re.compile(r"(?P<name>.+)\.int(?P<bits>[48])(?P<transposed>t?)")
SCALES, ZERO_POINTS = ".scales", ".zero_points"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix W of y = x W^T in blocks along its columns: w = (code - zero_point) * scale.

    codes: uint8 (rows, columns / block, block * bits / 8), low bits first; scales: float (rows, columns / block);
    zero_points: uint8 (rows, ceil(columns / block * bits / 8)) packed like the codes, None means 2^(bits-1).
    `transposed`: the checkpoint stores W^T (Conv1D, (columns, rows)). The layout is MatMulNBits' own.
    """

    name: str
    codes: TensorInfo
    scales: TensorInfo
    zero_points: TensorInfo | None
    bits: int
    transposed: bool

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def block(self) -> int:
        return self.codes.shape[2] * 8 // self.bits

    @property
    def columns(self) -> int:
        return self.codes.shape[1] * self.block

    @property
    def shape(self) -> tuple[int, ...]:
        """As the checkpoint states it."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)


Weight = TensorInfo | Quantized


def codes_name(name: str, bits: int, *, transposed: bool) -> str:
    return f"{name}.int{bits}{'t' if transposed else ''}"


def open_weights(path: Path) -> Mapping[str, Weight]:
    """The weights of a bundle's own safetensors file, under the names of the checkpoint they come from."""
    tensors = read_header(path)[0]
    weights: dict[str, Weight] = {}
    taken: set[str] = set()
    for key, codes in tensors.items():
        if match := CODES.fullmatch(key):
            scales, zero_points = tensors.get(key + SCALES), tensors.get(key + ZERO_POINTS)
            if codes.dtype != "U8" or len(codes.shape) != 3 or scales is None or scales.shape != codes.shape[:2]:
                raise InputRefused(f"{path}: {key!r} is malformed", expected="codes and scales", todo="export again")
            bits, transposed = int(match["bits"]), bool(match["transposed"])
            weights[match["name"]] = Quantized(match["name"], codes, scales, zero_points, bits, transposed)
            taken |= {key, key + SCALES, key + ZERO_POINTS}
    return weights | {key: info for key, info in tensors.items() if key not in taken}


def dequantize(weight: Quantized) -> torch.Tensor:
    """The matrix in the checkpoint's own orientation, float32: exactly what the stored integers mean."""
    codes = unpack(read_tensor(weight.codes), weight.bits)  # (N, K / block, block)
    scales = read_tensor(weight.scales).float().reshape(weight.rows, -1, 1)
    if weight.zero_points is None:
        zero = torch.tensor(float(1 << (weight.bits - 1)))
    else:
        zero = unpack(read_tensor(weight.zero_points), weight.bits)[:, : scales.shape[1]].unsqueeze(2).float()
    matrix = ((codes.float() - zero) * scales).reshape(weight.rows, weight.columns)
    return matrix.T.contiguous() if weight.transposed else matrix


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes of `bits` bits each, from bytes that hold 8 / bits of them, low bits first."""
    if bits == 8:
        return packed
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).reshape(*packed.shape[:-1], -1)


def float_values(weights: Mapping[str, Weight]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every floating-point tensor by its checkpoint name, float32, one at a time."""
    for name, weight in weights.items():
        if isinstance(weight, Quantized):
            yield name, dequantize(weight)
        elif weight.dtype in FLOATS:
            yield name, read_tensor(weight).float()
