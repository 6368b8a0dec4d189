"""The plots of one bundle: units at the axes, limits dashed, and the content in words for screen readers."""

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.markers import CARETUPBASE
from matplotlib.ticker import MaxNLocator, NullFormatter

from exporter.parity.result import BundleResult, Histogram, Stage
from exporter.report.drawing import (
    DASHES,
    FIRST,
    HALO,
    LIMIT,
    MUTED,
    SECOND,
    SMALL,
    THIRD,
    decade,
    draw,
    rows_with_labels,
)
from exporter.report.figures import figure, recorded, stage_name

FEEDING = ("cache.kl", "padding.kl")  # limits of the plot of feedings, not of the distribution
FLOOR = 1e-12  # what is smaller, and zero, is drawn here on a logarithmic axis
PAIRS = {
    "T-O": (FIRST, "-", "truth to bundle"),
    "R-O": (SECOND, "-", "reference to bundle"),
    "T-R": (THIRD, (0, (5, 1.5)), "truth to reference"),
}


def kl_distribution(bundle: BundleResult) -> str:
    """Tokens by KL for three pairs, with each pair's mean, and the limits on means."""
    shown = [one for one in bundle.histograms if one.pair in PAIRS and sum(one.counts)]
    limits = {
        gate.limit: gate.gate
        for gate in bundle.gates
        if gate.statistic == "kl_mean" and gate.limit and gate.gate not in FEEDING
    }

    def paint(axes: Axes) -> None:
        for one in shown:
            colour, dashes, words = PAIRS[one.pair]
            share = 100 * np.array(one.counts) / sum(one.counts)
            label = f"{words} ({one.pair})"
            edges = 10.0 ** np.array(one.edges)
            axes.stairs(share, edges, color=colour, linestyle=dashes, label=label, linewidth=1.7)
            mean = recorded(bundle, one.pair, "kl_mean")
            if mean:
                axes.plot([mean], [0], marker=CARETUPBASE, color=colour, markersize=9, clip_on=False, zorder=4)
        for limit, name in sorted(limits.items()):
            axes.axvline(limit, color=LIMIT, linewidth=1, linestyle=DASHES)
            axes.annotate(
                f"{name} {figure(limit)}", (limit, 0.98), xycoords=("data", "axes fraction"), xytext=(-2, 0),
                textcoords="offset points", rotation=90, va="top", ha="right", fontsize=SMALL - 1, color=LIMIT,
                path_effects=HALO,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(*decade(min(_low(one) for one in shown), max(*(_high(one) for one in shown), *limits, 1e-9)))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("KL of a token, nats (log scale)")
        axes.set_ylabel("tokens, %")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.05, 1), ncols=1, fontsize=SMALL, labelspacing=0.2)

    means = [f"{PAIRS[one.pair][2]} {figure(recorded(bundle, one.pair, 'kl_mean'))}" for one in shown]
    alt = f"Histogram of tokens by KL divergence. Means in nats: {', '.join(means)}. "
    alt += f"Limits on means: {', '.join(f'{name} {figure(limit)}' for limit, name in sorted(limits.items()))}."
    return draw(paint, 3.5, alt)


def stage_ladder(all_stages: Sequence[Stage], chain: str) -> str:
    """Each stage's share of the error of one chain, first stage on top."""
    stages = [stage for stage in all_stages if stage.chain == chain and stage.share is not None]
    shares = [100 * (stage.share or 0) for stage in stages]
    labels = [stage_name(stage.step).replace("->", "→") + _nats(stage.kl) for stage in stages]

    def paint(axes: Axes) -> None:
        axes.barh(range(len(stages)), shares, color=[FIRST if share >= 0 else SECOND for share in shares], height=0.34)
        for i, share in enumerate(shares):
            axes.annotate(
                f"{share:.1f} %".replace("-0.0 ", "0.0 "), (max(share, 0), i), xytext=(5, 0), va="center",
                textcoords="offset points", fontsize=SMALL + 0.5,
            )  # fmt: skip
        rows_with_labels(axes, labels)
        axes.set_xlim(min(0, *shares) * 1.1, max(100, *shares) * 1.17)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_xlabel("share of the error, % (the shares sum to 100)")

    parts = "; ".join(f"{stage_name(stage.step)} {share:.1f} %" for stage, share in zip(stages, shares, strict=True))
    return draw(paint, 0.62 * len(stages) + 0.75, f"Bars: each stage's share of the error, {chain}. {parts}.")


def kl_by_position(bundle: BundleResult) -> str:
    """Mean KL in ranges of positions."""
    edges = [bundle.by_position[0].start, *(part.stop for part in bundle.by_position)]
    values = np.maximum([part.kl for part in bundle.by_position], FLOOR)

    def paint(axes: Axes) -> None:
        axes.stairs(values, edges, color=FIRST, linewidth=1.7, baseline=None)
        axes.set_yscale("log")
        axes.set_ylim(*decade(values.min() / 1.5, values.max() * 1.5))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(edges), max(edges))
        axes.set_xlabel("position in the document, tokens")
        axes.set_ylabel("mean KL T-O, nats (log scale)")

    alt = f"Mean KL by position: {figure(values[0])} nats at the start, {figure(values[-1])} at token {edges[-1] - 1}, "
    return draw(paint, 2.9, f"{alt}largest {figure(values.max())}.")


def cache_checks(bundle: BundleResult) -> str:
    """Other ways of feeding the same tokens against one prefill: the largest difference where a gate limits that."""
    limits = {gate.limit for gate in bundle.gates if gate.gate in ("cache.max", "padding.max") and gate.limit}
    largest = bool(limits)
    if not largest:
        limits = {gate.limit for gate in bundle.gates if gate.gate in FEEDING and gate.limit}
    found = [check.centered_max if largest else max(check.kl, 0.0) for check in bundle.cache]
    unit = "largest centered difference of a logit (log scale)" if largest else "mean KL, nats (log scale)"

    def paint(axes: Axes) -> None:
        values = np.maximum(found, FLOOR)
        axes.hlines(range(len(values)), FLOOR / 10, values, color=MUTED, linewidth=2)
        axes.scatter(values, range(len(values)), color=FIRST, s=30, zorder=3)
        for i, value in enumerate(found):
            axes.annotate(
                figure(value), (max(value, FLOOR), i), xytext=(6, 0), textcoords="offset points", va="center",
                fontsize=SMALL, path_effects=HALO,
            )  # fmt: skip
        for limit in limits:
            axes.axvline(limit, color=LIMIT, linewidth=1, linestyle=DASHES)
            axes.annotate(
                f"limit {figure(limit)}", (limit, 1.0), xycoords=("data", "axes fraction"), xytext=(-3, 0),
                textcoords="offset points", va="top", ha="right", fontsize=SMALL, color=LIMIT,
            )  # fmt: skip
        axes.set_xscale("log")
        rows_with_labels(axes, [check.name for check in bundle.cache])
        axes.set_xlim(FLOOR / 10, decade(FLOOR, max(*values, *limits, 1e-3))[1] * 300)
        axes.set_xlabel(unit)

    parts = "; ".join(f"{check.name} {figure(value)}" for check, value in zip(bundle.cache, found, strict=True))
    limit = ", ".join(figure(value) for value in sorted(limits)) or "none"
    return draw(paint, 0.42 * len(found) + 0.7, f"{unit.capitalize()}, by way of feeding: {parts}. Limit: {limit}.")


def projections(bundle: BundleResult, share: float = 0.02) -> str:
    """The adapter's share in each weight, with four standard errors, by layer: which layer is wrong."""
    known = [(p.tensor, p.share, p.error) for p in bundle.projections if p.share is not None and p.error is not None]
    layers = [layer(tensor) for tensor, _, _ in known]
    places = [float(i) if number is None else float(number) for i, number in enumerate(layers)]
    shares = np.array([value for _, value, _ in known])
    errors = 4 * np.array([error for _, _, error in known])
    wrong = np.abs(shares - 1) > np.maximum(share, errors)

    def paint(axes: Axes) -> None:
        axes.errorbar(places, shares, yerr=errors, fmt="none", ecolor=MUTED, elinewidth=2)
        for place, value, bad in zip(places, shares, wrong, strict=True):
            marker, colour, size = ("X", LIMIT, 8) if bad else ("o", FIRST, 5)
            axes.plot(place, value, marker, color=colour, markersize=size)
        for i in np.flatnonzero(wrong)[:6]:
            axes.annotate(
                _short(known[i][0]), (places[i], shares[i]), xytext=(6, 5), textcoords="offset points", fontsize=SMALL,
                color=LIMIT, ha="right" if places[i] > 0.6 * max(places) else "left",
            )  # fmt: skip
        for limit in (1 - share, 1 + share):
            axes.axhline(limit, color=LIMIT, linewidth=1, linestyle=DASHES)
        low, high = min(*(shares - errors), 1 - 2 * share), max(*(shares + errors), 1 + 2 * share)
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer" if None not in layers else "adapted weight, in the model's order")
        axes.set_ylabel("share of the adapter's change")

    names = ", ".join(known[i][0] for i in np.flatnonzero(wrong)[:6]) or "none"
    alt = f"The adapter's share in {len(known)} weights, from {figure(shares.min())} to {figure(shares.max())}; "
    return draw(paint, 2.9, f"{alt}1 is right. Weights beyond the limits: {names}.")


def layer(tensor: str) -> int | None:
    """The first number in a tensor's name: its layer, in every architecture that numbers its blocks."""
    found = re.search(r"(?:^|\.)(\d+)\.", tensor)
    return int(found.group(1)) if found else None


def chains(stages: Sequence[Stage]) -> Sequence[str]:
    """Chains of stages that have shares, in order."""
    return list(dict.fromkeys(stage.chain for stage in stages if stage.share is not None))


def _nats(kl: float | None) -> str:
    return "" if kl is None else f", mean KL {figure(kl)} nats"


def _short(tensor: str) -> str:
    return tensor.removesuffix(".weight").removeprefix("transformer.").removeprefix("model.")


def _low(histogram: Histogram) -> float:
    return 10.0 ** min(e for e, n in zip(histogram.edges, histogram.counts, strict=False) if n)


def _high(histogram: Histogram) -> float:
    return 10.0 ** max(e for e, n in zip(histogram.edges[1:], histogram.counts, strict=True) if n)
