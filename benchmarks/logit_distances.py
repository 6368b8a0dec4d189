"""How far apart the models are whose logits a verification has kept so far, while it runs or after it was stopped.

    python benchmarks/logit_distances.py build/full-size/logits/DIRECTORY --vocabulary 50257

A Markdown table of means over all scored tokens, without the bounds and the verdict that only a finished run gives.
"""

import argparse
from pathlib import Path

import numpy as np
from contest import table_lines

from exporter.parity.statistics import kl_divergence, log_softmax

PAIRS = (("R", "O"), ("R", "T"), ("T", "B"), ("T", "M32"), ("M32", "F"), ("F", "O"))
ROWS = 64  # of logits in memory at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="the --scratch of verify: the directory of one set of documents")
    parser.add_argument("--vocabulary", type=int, default=50257)
    options = parser.parse_args()
    # F-848ba34ae628946d.f32 is F of one bundle; of several the last stands.
    stores = {path.name.partition(".")[0].partition("-")[0]: path for path in sorted(options.directory.glob("*.f32"))}
    rows = [row(stores, pair, options.vocabulary) for pair in PAIRS if all(name in stores for name in pair)]
    print(*table_lines(("pair", "tokens", "mean KL", "p99", "same first token", "centered maximum"), rows), sep="\n")


def row(stores: dict[str, Path], pair: tuple[str, str], vocabulary: int) -> tuple[str, ...]:
    """KL in nats, and the largest difference of two logits less its mean over the vocabulary."""
    ref, cand = (np.memmap(stores[name], np.float32, "r").reshape(-1, vocabulary) for name in pair)
    kl, same, largest = [], 0, 0.0
    for first in range(0, len(ref), ROWS):
        a, b = (log_softmax(one[first : first + ROWS]) for one in (ref, cand))
        kl.append(kl_divergence(a, b))
        same += int((a.argmax(-1) == b.argmax(-1)).sum())
        largest = max(largest, float(np.abs((b - a) - (b - a).mean(-1, keepdims=True)).max()))
    found = np.concatenate(kl)
    shares = f"{found.mean():.3g}", f"{np.quantile(found, 0.99):.2g}", f"{same / len(ref):.1%}", f"{largest:.2e}"
    return "-".join(pair), str(len(ref)), *shares


if __name__ == "__main__":
    main()
