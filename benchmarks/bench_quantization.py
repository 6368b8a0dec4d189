"""`make bench-quantization`: what 8 and 4 bits cost, ours and llama.cpp's, each against its own float32 run.

    python benchmarks/bench_quantization.py --sizes demo 512x12x16

Mean KL(float32 || quantized) in nats and the share of equal first tokens, over every position of the packaged Alpaca
prompts' beginnings, bundles and GGUF files as they are shipped: activations, embedding and head as each rounds them.
llama.cpp's gelu is the tanh approximation whatever the configuration says, which is why each is compared with itself.
The model is the packaged base, or that base widened to WIDTHxLAYERSxHEADS without changing what it computes
(make_base.py --from-demo): llama.cpp's Q4_K needs widths that 256 divides.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from bench_blocks import read_documents
from contest import make_models, parse_contest, table_lines
from decode_models import CONTENDERS as DECODED
from decode_models import HERE, ROOT, Place, make_checkpoint, make_peers, run

import exporter
from exporter.graph.weights import WEIGHTS
from exporter.parity.statistics import kl_divergence, log_softmax

FLOAT = {"exporter": "exporter-native", "llama.cpp": "llama.cpp-f32"}
# bench_decode's own, and block sizes and types that are for quality alone
CONTENDERS = {name: entry for name, entry in DECODED.items() if name.startswith(tuple(FLOAT))} | {
    "exporter-int8-block64": replace(DECODED["exporter-int8"], flavour="int8/64"),
    "exporter-int4-block64": replace(DECODED["exporter-int4"], flavour="int4/64"),
    "llama.cpp-q4_k_s": replace(DECODED["llama.cpp-q4_0"], flavour="q4_k_s"),
    "llama.cpp-q4_k_m": replace(DECODED["llama.cpp-q4_0"], flavour="q4_k_m"),
}
Documents = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["demo", "512x12x16"], help="demo, or WIDTHxLAYERSxHEADS")
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--length", type=int, default=128, help="tokens of a document")
    parser.add_argument("--work", type=Path, default=ROOT / "build/bench")
    options = parse_contest(parser, CONTENDERS)
    for package, reason in make_peers(options.work / "peers", options.wheels).items():
        print(f"not installed: {package}: {reason}")
    documents = read_documents(options.documents, options.length)
    for size in options.sizes:
        place = Place(options.work / "quantization" / size, options.work / "peers", options.threads)
        make_base(place, size)
        print(f"\n### {size}\n", *table(place, options.chosen, documents), sep="\n", flush=True)


def make_base(place: Place, size: str) -> None:
    if size == "demo":
        make_checkpoint(place, size)
    elif not place.base.exists():
        shape = [f"--{name}={value}" for name, value in zip(("width", "layers", "heads"), size.split("x"), strict=True)]
        run([sys.executable, HERE / "make_base.py", "--from-demo", *shape, "--out", place.directory])


def table(place: Place, chosen: Sequence[str], documents: Documents) -> list[str]:
    models, missing = make_models(place, CONTENDERS, chosen)
    rows = []
    for family, reference in FLOAT.items():
        if reference not in models:
            continue
        logits_of = logits_of_bundle if family == "exporter" else logits_of_gguf
        truth = logits_of(place, reference, models[reference], documents)
        for name, model in models.items():
            if name.startswith(family) and name != reference:
                kl, same = distance(truth, logits_of(place, name, model, documents))
                rows.append((name, f"{nbytes(model) / 1e6:.1f}", f"{kl:.2e}", f"{same:.1%}"))
    lines = table_lines(("contender", "weights MB", "mean KL", "equal first tokens"), rows)
    return lines + [f"missing: {name}: {reason}" for name, reason in missing.items()]


def logits_of_bundle(place: Place, name: str, model: Path, documents: Documents) -> np.ndarray:
    """float32 (tokens of all documents, V)."""
    runner = exporter.load(model, provider="cpu", threads=place.threads)
    return np.concatenate([runner.logits(ids) for ids in documents])


def logits_of_gguf(place: Place, name: str, model: Path, documents: Documents) -> np.ndarray:
    given, out = place.directory / "documents.json", place.directory / f"{name}.npy"
    given.write_text(json.dumps(documents))
    script = [place.peers_python, HERE / "logits_llama.py", model, given, out, "--threads", str(place.threads)]
    run(script)
    return np.load(out, mmap_mode="r")


def distance(truth: np.ndarray, found: np.ndarray, rows: int = 256) -> tuple[float, float]:
    """Mean KL(truth || found) and the share of equal first tokens, of logits (tokens, V)."""
    kl, same = 0.0, 0
    for first in range(0, len(truth), rows):
        a, b = (log_softmax(one[first : first + rows]) for one in (truth, found))
        kl += float(kl_divergence(a, b).sum())
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
    return kl / len(truth), same / len(truth)


def nbytes(model: Path) -> int:
    return model.stat().st_size if model.is_file() else (model / WEIGHTS).stat().st_size


if __name__ == "__main__":
    main()
