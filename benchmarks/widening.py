"""The trained demo pair at a larger size, saying what it said before.

Every channel of the residual stream, of a head and of the inner layer stands several times. Whatever reads copies has
its weights divided by their number; noise is added to them that sums to zero over the copies, so that it is invisible
to equal copies and yet makes weights of the size that a trained model of that width has. Blocks between the demo's own
read the same stream and write only such noise, a little of it: their output is zero but for rounding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from exporter.sources.checkpoint import open_checkpoint, read_headers
from exporter.sources.values import read_rows, read_tensor

DEMO = Path(__file__).parents[1] / "exporter/demo"
WIDTH, LAYERS, HEADS, POSITIONS, VOCABULARY = 128, 12, 4, 512, 50257
HEAD = WIDTH // HEADS
IDLE = 1 / 64  # the noise that an added block writes, as a share of what the demo's own block would
WINDOWS, STEP = 1 << 16, 37  # where in the noise a matrix begins, and how far apart its rows begin
ROWS = 2048
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight", "lora_A")


@dataclass(frozen=True, slots=True)
class Run:
    """Rows from `start` that copy the demo's from `source`: each is copy number `copy` of `count`."""

    start: int
    source: int
    length: int
    copy: int
    count: int


def why_not(width: int, layers: int, heads: int) -> str:
    """Why the demo pair cannot be widened to this shape; empty if it can."""
    if width % WIDTH:
        return f"the width {width} is not a multiple of {WIDTH}"
    if layers < LAYERS:
        return f"{layers} layers are fewer than {LAYERS}"
    if heads < HEADS or width // heads < HEAD:
        return f"{heads} heads of {width // heads} channels hold less than {HEADS} of {HEAD}"
    return ""


def runs_of(sources: list[int]) -> list[Run]:
    """`sources` names for each row the one it copies; consecutive rows of equal copy number make a run."""
    counts = [0] * (max(sources) + 1)
    copies = []
    for source in sources:
        copies.append(counts[source])
        counts[source] += 1
    runs: list[Run] = []
    for row, (source, copy) in enumerate(zip(sources, copies, strict=True)):
        last = runs[-1] if runs else None
        if last and (source - row, copy, counts[source]) == (last.source - last.start, last.copy, last.count):
            runs[-1] = Run(last.start, last.source, last.length + 1, copy, last.count)
        else:
            runs.append(Run(row, source, 1, copy, counts[source]))
    return runs


class Widened:
    """The demo pair's tensors at another shape, in float32. `why_not` must have nothing against it."""

    def __init__(self, width: int, layers: int, heads: int, seed: int) -> None:
        self.copies, self.seed, self.longest = width // WIDTH, seed, 4 * width
        self.base = open_checkpoint(DEMO / "base").tensors
        self.adapter = read_headers(DEMO / "adapter" / "adapter_model.safetensors")
        self.own_blocks = [block * layers // LAYERS for block in range(LAYERS)]
        size = width // heads
        head = torch.tensor([(h % HEADS) * HEAD + d % HEAD for h in range(heads) for d in range(size)])
        self.reads = {
            "stream": runs_of([row % WIDTH for row in range(width)]),
            "heads": runs_of(head.tolist()),
            "inner": runs_of([row % (4 * WIDTH) for row in range(4 * width)]),
        }
        self.qkv = torch.cat([head, head + WIDTH, head + 2 * WIDTH])
        # q k^T sums every copy, and is divided by the root of the new head size instead of the old
        channels = torch.arange(size) % HEAD
        query = math.sqrt(size / HEAD) / torch.bincount(channels)[channels]
        self.qkv_scale = torch.cat([query.repeat(heads), torch.ones(2 * width)])
        self.pools: dict[int, torch.Tensor] = {}

    def blocks(self, name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
        """The base's tensor `name`, which has this shape, in blocks of rows."""
        local = name.removeprefix("transformer.")
        if local == "wte.weight":
            for start in range(0, shape[0], ROWS):
                yield self.repeated(read_rows(self.base[name], start, min(start + ROWS, shape[0])))
        elif local == "wpe.weight":  # beyond the demo's positions there is nothing to equal: they begin again
            for start in range(0, shape[0], POSITIONS):
                yield self.repeated(read_rows(self.base[name], 0, min(POSITIONS, shape[0] - start)))
        elif local.startswith("ln_f."):  # the tied head sums every copy
            yield self.repeated(read_tensor(self.base[name])) / self.copies
        else:
            _, index, part = local.split(".", 2)
            yield from self._block_part(int(index), part)

    def factors(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (r, in) and B (out, r) of the adapter for one block."""
        prefix = f"base_model.model.transformer.h.{self._source(layer)}.attn.c_attn.lora_"
        down, up = (read_tensor(self.adapter[f"{prefix}{factor}.weight"]).float() for factor in "AB")
        wide = torch.cat(list(self._rows(down.T, "stream", self._window(layer, "lora_A"))))
        return wide.T.contiguous(), up[self.qkv] * self.qkv_scale[:, None]

    def repeated(self, values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values.float()] * self.copies, dim=-1)

    def _source(self, layer: int) -> int:
        """The demo's block that block `layer` is, or follows."""
        return sum(own <= layer for own in self.own_blocks) - 1

    def _block_part(self, layer: int, part: str) -> Iterator[torch.Tensor]:
        values = read_tensor(self.base[f"transformer.h.{self._source(layer)}.{part}"]).float()
        added = layer not in self.own_blocks
        window = self._window(layer, part) if part in MATRICES else 0
        if part == "attn.c_attn.weight":
            yield from self._rows(values[:, self.qkv] * self.qkv_scale, "stream", window)
        elif part == "attn.c_attn.bias":
            yield values[self.qkv] * self.qkv_scale
        elif part == "mlp.c_fc.weight":
            yield from self._rows(self.repeated(values), "stream", window)
        elif part in ("attn.c_proj.weight", "mlp.c_proj.weight"):
            reads = "heads" if part.startswith("attn") else "inner"
            yield from self._rows(self.repeated(values), reads, window, idle=added)
        elif part in ("attn.c_proj.bias", "mlp.c_proj.bias"):
            yield self.repeated(values) * (0 if added else 1)
        else:
            yield self.repeated(values)

    def _window(self, layer: int, part: str) -> int:
        return (layer * len(MATRICES) + MATRICES.index(part)) * 40503 % WINDOWS

    def _rows(self, weight: torch.Tensor, reads: str, window: int, idle: bool = False) -> Iterator[torch.Tensor]:
        """`weight` (in, out) for inputs that stand several times: divided, and with noise that sums to zero.

        The noise makes a weight's variance that of the demo's weight divided by the number of copies, as it is where
        a wider model has independent weights. An idle matrix has the noise alone, and little of it.
        """
        size = weight.square().mean(1, keepdim=True).sqrt()
        for run in self.reads[reads]:
            rows = slice(run.source, run.source + run.length)
            noise = self._noise(run, window, weight.shape[1]) * (size[rows] / math.sqrt(run.count))
            yield noise * IDLE if idle else noise.add_(weight[rows], alpha=1 / run.count)

    def _noise(self, run: Run, window: int, columns: int) -> torch.Tensor:
        """Standard normal rows (length, columns), which sum to zero over all runs that copy the same rows."""
        width = WINDOWS + 4 * WIDTH * STEP + self.longest
        if run.count not in self.pools:
            pool = torch.randn(run.count, width, generator=torch.Generator().manual_seed(self.seed + run.count))
            self.pools[run.count] = pool - pool.double().mean(0).float()
        start = run.copy * width + window + run.source * STEP
        return self.pools[run.count].as_strided((run.length, columns), (STEP, 1), start)
