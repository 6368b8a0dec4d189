"""Plots as inline SVG that takes its colours from the page, so that one drawing serves light and dark."""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("svg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from exporter.parity.result import BundleResult
from exporter.report.figures import figure, stage_name

# Placeholders that become CSS variables: matplotlib knows no currentColor.
INK, MUTED, FIRST, SECOND, THIRD, LIMIT = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
WIDTH = 5.4  # inches: at a phone's width the type is still read
VARIABLES = {INK: "ink", MUTED: "line", FIRST: "first", SECOND: "second", THIRD: "third", LIMIT: "bad"}
STYLE: Any = {  # matplotlib's own type names every key
    "svg.fonttype": "none",
    "svg.hashsalt": "exporter",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def kl_distribution(bundle: BundleResult) -> str:
    """Tokens by log10 KL for three pairs, and the limits on mean KL."""

    def paint(axes: Axes) -> None:
        styles = {
            "T-O": (FIRST, "truth to bundle"),
            "R-O": (SECOND, "reference to bundle"),
            "T-R": (THIRD, "truth to reference"),
        }
        used = []
        for histogram in bundle.histograms:
            if histogram.pair in styles and sum(histogram.counts):
                colour, label = styles[histogram.pair]
                share = 100 * np.array(histogram.counts) / sum(histogram.counts)
                axes.stairs(share, histogram.edges, color=colour, label=f"{histogram.pair} {label}", linewidth=1.6)
                used += [edge for edge, count in zip(histogram.edges, histogram.counts, strict=False) if count]
        limits = {gate.limit: gate.gate for gate in bundle.gates if gate.statistic == "kl_mean" and gate.limit}
        for limit, name in sorted(limits.items()):
            axes.axvline(np.log10(limit), color=LIMIT, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                name, (np.log10(limit), 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top", ha="right",
                fontsize=8, color=LIMIT,
            )  # fmt: skip
        if used:
            axes.set_xlim(min(used) - 0.5, max(*used, *(np.log10(limit) for limit in limits)) + 0.5)
        axes.set_xlabel("KL per token, log10 nats (dashed: limits on the mean)")
        axes.set_ylabel("% of tokens")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=3, fontsize=8, columnspacing=1, handlelength=1)

    return draw(paint, height=3.0)


def stage_ladder(bundle: BundleResult) -> str:
    """Each stage's share of the error, first stage on top."""

    def paint(axes: Axes) -> None:
        stages = [stage for stage in bundle.stages if stage.share is not None]
        shares = [100 * (stage.share or 0) for stage in stages]
        axes.barh(range(len(stages)), shares, color=[FIRST if share >= 0 else SECOND for share in shares], height=0.55)
        for i, stage in enumerate(stages):
            text, place = f"{shares[i]:.1f} %, KL {figure(stage.kl)}", (max(shares[i], 0), i)
            axes.annotate(text, place, xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_yticks(
            range(len(stages)), [stage_name(stage.step).replace(" (", "\n(").replace("->", "→") for stage in stages]
        )
        axes.set_xlim(min(0, *shares) * 1.1, max(100, *shares) * 1.45)
        axes.invert_yaxis()
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_xlabel("% of the error from truth to bundle (they sum to 100)")

    return draw(paint, height=0.6 * max(3, len(bundle.stages)) + 0.6)


def kl_by_position(bundle: BundleResult) -> str:
    def paint(axes: Axes) -> None:
        edges = [bundle.by_position[0].start, *(part.stop for part in bundle.by_position)]
        values = np.array([part.kl for part in bundle.by_position])
        axes.stairs(np.maximum(values, 1e-18), edges, color=FIRST, linewidth=1.6, baseline=None)
        axes.set_yscale("log")
        axes.set_xlabel("position in the document, tokens")
        axes.set_ylabel("mean KL T-O, nats")

    return draw(paint, height=2.6)


def cache_checks(bundle: BundleResult) -> str:
    """Prefill against other ways of feeding, with the limit on the largest difference where there is one."""

    def paint(axes: Axes) -> None:
        values = [max(check.centered_max, 1e-9) for check in bundle.cache]
        axes.scatter(values, range(len(values)), color=FIRST, s=28, zorder=3)
        axes.hlines(range(len(values)), 1e-9, values, color=MUTED, linewidth=1)
        axes.set_yticks(range(len(values)), [check.name for check in bundle.cache], fontsize=9)
        axes.set_xscale("log")
        axes.set_xlim(5e-10, max(1e-1, *values) * 3)
        axes.invert_yaxis()
        limits = {gate.limit for gate in bundle.gates if gate.gate in ("cache.max", "padding.max") and gate.limit}
        for limit in limits:
            axes.axvline(limit, color=LIMIT, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlabel("largest centered difference of a logit" + (" (dashed: limit)" if limits else ""))

    return draw(paint, height=0.27 * len(bundle.cache) + 0.7)


def projections(bundle: BundleResult) -> str:
    """The adapter's share in each weight, with four standard errors: which layer is wrong."""

    def paint(axes: Axes) -> None:
        numbered = [(i, p.share, p.error) for i, p in enumerate(bundle.projections)]
        known = [(i, share, error) for i, share, error in numbered if share is not None and error is not None]
        places = [i for i, _, _ in known]
        shares = [share for _, share, _ in known]
        axes.errorbar(
            places, shares, yerr=[4 * error for _, _, error in known], fmt="o", color=FIRST, ecolor=MUTED, markersize=4
        )
        for limit in (0.98, 1.02):
            axes.axhline(limit, color=LIMIT, linewidth=1, linestyle=(0, (4, 3)))
        low, high = min([*shares, 0.96]), max([*shares, 1.04])
        axes.set_ylim(low - 0.02, high + 0.02)
        axes.set_xlabel("adapted weight, in the model's order")
        axes.set_ylabel("share of the adapter")

    return draw(paint, height=2.4)


def draw(paint: Callable[[Axes], None], height: float) -> str:
    """One SVG element that is as wide as its place."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(canvas.subplots())
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", svg, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
