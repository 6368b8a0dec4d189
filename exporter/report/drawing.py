"""SVG that takes its colours from the page, so that one drawing serves light, dark and print."""

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib

matplotlib.use("svg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

# Placeholders that become CSS variables: matplotlib knows no currentColor.
INK, MUTED, FIRST, SECOND, THIRD, LIMIT, CARD = (f"#0{i}0{i}0{i}" for i in range(1, 8))
VARIABLES = {INK: "ink", MUTED: "line", FIRST: "first", SECOND: "second", THIRD: "third", LIMIT: "bad", CARD: "card"}
WIDTH = 4.6  # inches, 331 of the page's pixels at scale 1: a phone shows the type at about its own size
SMALL, DASHES = 9.5, (0, (4, 3))
STYLE: Any = {  # matplotlib's own type names every key
    "svg.fonttype": "none",
    "svg.hashsalt": "exporter",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": MUTED,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


HALO = [withStroke(linewidth=3, foreground=CARD)]  # keeps a label readable over lines


def draw(paint: Callable[[Axes], None], height: float, alt: str) -> str:
    """One SVG element that is as wide as its place; `alt` is what a screen reader says instead."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(canvas.subplots())
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def decade(low: float, high: float) -> tuple[float, float]:
    """Limits of a logarithmic axis: whole powers of ten around the values, so that at least one tick has a label."""
    return 10.0 ** np.floor(np.log10(low)), 10.0 ** np.ceil(np.log10(high * 1.0001))


def rows_with_labels(axes: Axes, labels: list[str]) -> None:
    """One row for each label, first on top, the label above its row: long names take no width from the plot."""
    for i, label in enumerate(labels):
        axes.annotate(
            label, (0, i - 0.33), xycoords=("axes fraction", "data"), va="bottom", ha="left", fontsize=SMALL + 0.5
        )
    axes.set_ylim(len(labels) - 0.6, -0.95)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
