"""bench_decode's worker for exporter's Runner. `model` is a directory, `flavour` its bundle's precision."""

import math
from importlib.metadata import version
from pathlib import Path

import numpy as np
from decode_worker import Job, work

from exporter.graph.bundle import Bundle, bundle_weights, bundles_in
from exporter.graph.weights import Quantized
from exporter.runtime.load import load


class Exporter:
    version = version("onnxruntime-gpu")

    def __init__(self, job: Job) -> None:
        bundle = next(one for one in bundles_in(Path(job.model)) if one.precision == job.flavour.partition("/")[0])
        self.runner = load(bundle, provider="cpu", threads=job.threads)
        self.cache = self.runner.new_cache(1, job.context)
        self.weight_bytes = read_bytes(bundle)
        self.slot_bytes = self.cache.shape.nbytes(1, 1)

    def prefill(self, ids: list[int]) -> int:
        self.cache.lengths[:] = 0
        return int(np.argmax(self.runner.prefill(self.cache, 0, ids)))

    def decode(self, token: int) -> int:
        return int(np.argmax(self.runner.decode(self.cache, [token])[0]))


def read_bytes(bundle: Bundle) -> int:
    """Of all weights but position embeddings. Scales and floats are float32 on a CPU, whatever is stored."""
    total = 0
    for name, weight in bundle_weights(bundle).items():
        if isinstance(weight, Quantized):
            total += weight.codes.nbytes + 4 * math.prod(weight.scales.shape)
        elif not name.endswith("wpe.weight"):
            total += 4 * math.prod(weight.shape)
    return total


if __name__ == "__main__":
    work(Exporter)
