"""What a bundle needs in memory, and what the machine has left: asked before a session is opened."""

import math
from pathlib import Path

from exporter.graph.architectures import read_decoder
from exporter.graph.bundle import Bundle, bundle_weights
from exporter.graph.decoder import Kind, decoder_weights
from exporter.graph.free_memory import free_main_memory
from exporter.graph.weights import Quantized, Weight
from exporter.sources.checkpoint import read_json

# The runtime itself, the graph, one chunk's activations: 590M in fp16 took 2.8 GB where its fp32 weights are 2.4 GB.
OVERHEAD, SLACK = 150 << 20, 1.05
TABLES = ("tokens", "positions")


def needed_memory(bundle: Bundle) -> int:
    """Bytes that an open session holds, without a cache.

    On a CPU the stored 16-bit weights become float32 (ONNX Runtime folds the Cast), packed once; embeddings are also
    read row by row as they are stored. Quantized weights stay as they are. CUDA holds weights in float16.
    """
    if bundle.precision == "optimum":
        return int(SLACK * sum(file.stat().st_size for file in _graph_files(bundle))) + OVERHEAD
    decoder = read_decoder(read_json(bundle.directory / "config.json"))
    weights = decoder_weights(decoder, bundle_weights(bundle))
    held = sum(_held(decoder.parameters[name].kind, weight, bundle.target) for name, weight in weights.items())
    return int(SLACK * held) + OVERHEAD


def _graph_files(bundle: Bundle) -> list[Path]:
    weights = bundle.section.get("weights")
    names = [name for name in weights if isinstance(name, str)] if isinstance(weights, list) else []
    return [file for file in (bundle.graph, *(bundle.directory / name for name in names)) if file.is_file()]


def _held(kind: Kind, weight: Weight, target: str) -> int:
    if isinstance(weight, Quantized):
        own = weight.codes.nbytes + 4 * math.prod(weight.scales.shape)  # scales become float32
        return 2 * own if kind in TABLES else own  # the head's packed copy beside the rows that Gather reads
    elements = 1
    for size in weight.shape:
        elements *= size
    width = 4 if target == "cpu" or kind in ("tokens", "head") else 2
    return width * elements + (weight.nbytes if kind in TABLES else 0)


def free_memory(provider: str) -> int:
    """Bytes that a new session may take on `provider` (cpu or cuda)."""
    if provider == "cuda":
        import torch  # the only thing here that knows the device

        return torch.cuda.mem_get_info()[0]
    return free_main_memory()
