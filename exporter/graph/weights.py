"""The weights a graph points at: tensors as stored, or block-quantized ones."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exporter.errors import InputRefused
from exporter.sources.safetensors_file import read_header
from exporter.sources.tensors import TensorInfo

WEIGHTS = "weights.safetensors"
BLOCK = 32  # weights that share a scale, by default
BLOCKS = (32, 64, 128, 256)
# Beside the codes `wte.weight.int8` stand `wte.weight.int8.scales`; a `t` after the bits says that the checkpoint
# stores the transpose, `.of40` that only 40 columns of the last block are the matrix's own.
CODES = re.compile(r"(?P<name>.+)\.int(?P<bits>[48])(?P<transposed>t?)(\.of(?P<columns>\d{1,12}))?")
SCALES = ".scales"
# The factors of an adapter that stands beside a quantized matrix: `h.0.attn.c_attn.weight.lora_A` and `.lora_B`.
DOWN, UP = ".lora_A", ".lora_B"


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix W of y = x W^T in blocks along its columns, w = (code - 2^(bits-1)) * scale; perhaps with a LoRA beside.

    codes: uint8 (rows, columns / block, block * bits / 8), low bits first; scales: float (rows, columns / block);
    `transposed`: the checkpoint stores W^T (Conv1D, (columns, rows)). The layout is MatMulNBits' own; where `block`
    does not divide `columns` the last block is filled up with codes that mean 0.
    down, up: float32 A^T (columns, r) and scale * B^T (r, rows): y = x W^T + (x A^T) (scale B^T).
    """

    name: str
    codes: TensorInfo
    scales: TensorInfo
    bits: int
    transposed: bool
    columns: int
    down: TensorInfo | None = None
    up: TensorInfo | None = None

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def block(self) -> int:
        return self.codes.shape[2] * 8 // self.bits

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The tensors of the file that it is made of."""
        parts = (self.codes, self.scales, self.down, self.up)
        return tuple(part for part in parts if part is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        """As the checkpoint states it."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)


Weight = TensorInfo | Quantized


def codes_name(name: str, bits: int, columns: int, block: int, *, transposed: bool) -> str:
    return f"{name}.int{bits}{'t' if transposed else ''}{f'.of{columns}' if columns % block else ''}"


def open_weights(path: Path) -> Mapping[str, Weight]:
    """The weights of a bundle's own safetensors file, under the names of the checkpoint they come from."""
    tensors = read_header(path)[0]
    weights: dict[str, Weight] = {}
    for key in tensors:
        if match := CODES.fullmatch(key):
            weights[match["name"]] = _quantized(path, tensors, key, match)
    taken = {part.name for weight in weights.values() if isinstance(weight, Quantized) for part in weight.parts}
    return weights | {key: info for key, info in tensors.items() if key not in taken}


def _quantized(path: Path, tensors: Mapping[str, TensorInfo], key: str, match: re.Match[str]) -> Quantized:
    codes, scales, name = tensors[key], tensors.get(key + SCALES), match["name"]
    if codes.dtype != "U8" or len(codes.shape) != 3 or scales is None or scales.shape != codes.shape[:2]:
        raise InputRefused(f"{path}: {key!r} is malformed", expected="codes and scales", todo="export again")
    bits = int(match["bits"])
    padded = codes.shape[1] * codes.shape[2] * 8 // bits
    columns = int(match["columns"] or padded)
    if not padded - codes.shape[2] * 8 // bits < columns <= padded:
        raise InputRefused(f"{path}: {key!r} has {padded} columns", expected=f"{columns} in whole blocks")
    return Quantized(
        name,
        codes,
        scales,
        bits,
        bool(match["transposed"]),
        columns,
        tensors.get(name + DOWN),
        tensors.get(name + UP),
    )
