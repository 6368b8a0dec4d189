"""What a bundle needs in memory, and what the machine has left: asked before a session is opened."""

import math
from pathlib import Path

import psutil

from exporter.graph.bundle import Bundle, bundle_weights
from exporter.graph.weights import Quantized, Weight

# The runtime itself, the graph, one chunk's activations: 590M in fp16 took 2.8 GB where its fp32 weights are 2.4 GB.
OVERHEAD, SLACK = 150 << 20, 1.05
CGROUP = Path("/sys/fs/cgroup")
EMBEDDINGS = ("wte.weight", "wpe.weight")


def needed_memory(bundle: Bundle) -> int:
    """Bytes that an open session holds, without a cache.

    On a CPU the stored 16-bit weights become float32 (ONNX Runtime folds the Cast), packed once; embeddings are also
    read row by row as they are stored. Quantized weights stay as they are. CUDA holds weights in float16.
    """
    if bundle.precision == "optimum":
        return int(SLACK * sum(bundle.section["files"][name]["size"] for name in _graph_files(bundle))) + OVERHEAD
    held = sum(_held(name, weight, bundle.target) for name, weight in bundle_weights(bundle).items())
    return int(SLACK * held) + OVERHEAD


def _graph_files(bundle: Bundle) -> list[str]:
    section = bundle.section
    return [section["graph"], *section["weights"]]


def _held(name: str, weight: Weight, target: str) -> int:
    if isinstance(weight, Quantized):
        own = weight.codes.nbytes + 4 * math.prod(weight.scales.shape)  # scales become float32
        return 2 * own if name.endswith(EMBEDDINGS) else own  # the head's packed copy beside the rows that Gather reads
    elements = 1
    for size in weight.shape:
        elements *= size
    width = 4 if target == "cpu" or name.endswith("wte.weight") else 2
    return width * elements + (weight.nbytes if name.endswith(EMBEDDINGS) else 0)


def free_memory(provider: str) -> int:
    """Bytes that a new session may take on `provider` (cpu or cuda): the smaller of the machine's and the group's."""
    if provider == "cuda":
        import torch  # the only thing here that knows the device

        return torch.cuda.mem_get_info()[0]
    return min(psutil.virtual_memory().available, _cgroup_free())


def _cgroup_free() -> int:
    """A container's limit less what it cannot give back; the machine's own size where there is no limit."""
    unlimited = psutil.virtual_memory().total
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return unlimited
        used = int((CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup v2 here
        return unlimited
    return max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))
