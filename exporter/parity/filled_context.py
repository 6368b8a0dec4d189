"""Where a context is full: the graph against transformers beyond the longest document, which no other gate looks at.

A table of rotary angles that ends too early, or frequencies that a tracer fixed, give the same logits however the graph
is fed, and wrong ones.
"""

from collections.abc import Sequence

import numpy as np

from exporter.parity.feeding import fill, pair
from exporter.parity.gates import Comparison
from exporter.parity.graphs import Graph
from exporter.parity.scoring import Scorer

NAME = "F-C"
LOGITS = 1 << 30  # bytes of one model's
TOKENS = 4096  # attention takes their square
POSITIONS = 16


def filled_length(context: int, vocab_size: int) -> int:
    """Tokens of a context that are filled: all that it holds, within TOKENS and LOGITS."""
    return min(context, TOKENS, LOGITS // (4 * vocab_size))


def compare_filled(
    carried: Scorer, graph: Graph, rows: Sequence[Sequence[int]], length: int, vocabulary: int
) -> Comparison | None:
    """Logits of both at POSITIONS of `length` tokens, from the end of the longest row on; None if no row is shorter.

    carried: transformers over the bundle's weights. graph: its products in full precision. vocabulary: ids compared.
    """
    longest = max(map(len, rows))
    if longest >= length:
        return None
    tokens = fill(rows, length)
    places = np.unique(np.linspace(longest, length - 1, POSITIONS).round().astype(np.int64))
    ref = carried.logits(tokens)[places, :vocabulary]
    cand = graph.logits(tokens)[places, :vocabulary]
    return Comparison(NAME, pair(ref, cand), np.zeros(len(places), np.int64), np.full(len(places), "response"))
