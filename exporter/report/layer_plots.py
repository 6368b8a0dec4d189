"""The plots that go along the model's parts: embeddings, blocks, head."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from exporter.parity.result import BundleResult, Layer, MergeBases
from exporter.report.drawing import FIRST, HALO, INK, LIMIT, MUTED, SECOND, SMALL, THIRD, decade, draw
from exporter.report.figures import figure, percent

CURVES = (
    ("local", FIRST, "o", "-", "this part alone"),
    ("accumulated", SECOND, "s", "-", "all parts up to here"),
    ("graph", THIRD, "^", (0, (5, 1.5)), "the graph's part alone"),
)


def layer_curve(bundle: BundleResult) -> str:
    """Relative squared error of each part: alone, accumulated, and the graph's against the same weights. No zeros."""
    layers = bundle.layers

    def paint(axes: Axes) -> None:
        drawn: list[float] = []
        for name, colour, marker, dashes, words in CURVES:
            points = [(i, value) for i, one in enumerate(layers) if (value := getattr(one, name))]
            if points:
                places, values = zip(*points, strict=True)
                style = {"marker": marker, "color": colour, "linestyle": dashes, "markersize": 4, "linewidth": 1.5}
                axes.plot(places, values, label=words, **style)
                drawn += values
        for i in _named(bundle):
            axes.axvline(i, color=LIMIT, linewidth=6, alpha=0.18)
            axes.annotate(
                layers[i].part, (i, 0.02), xycoords=("data", "axes fraction"), xytext=(-4, 0), ha="right", rotation=90,
                textcoords="offset points", fontsize=SMALL, color=LIMIT, path_effects=HALO,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylim(*decade(min(drawn) / 1.5, max(drawn) * 1.5))
        axes.yaxis.set_minor_formatter(NullFormatter())
        _parts(axes, layers)
        axes.set_ylabel("relative squared error (log scale)")
        axes.legend(loc="lower left", bbox_to_anchor=(-0.05, 1), ncols=1, fontsize=SMALL, labelspacing=0.2)

    return draw(
        paint, 3.4, f"Error by part of the model. {_worst(layers, 'local')}{_worst(layers, 'graph')}{_blame(bundle)}"
    )


def layer_swaps(bundle: BundleResult) -> str:
    """How much of the weights' error goes away when one part alone is the truth's."""
    layers = bundle.layers
    named = _named(bundle)

    def paint(axes: Axes) -> None:
        known = [(i, 100 * one.swap) for i, one in enumerate(layers) if one.swap is not None]
        for i, share in known:
            axes.bar(i, share, color=LIMIT if i in named else FIRST if share >= 0 else SECOND, width=0.7)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        _parts(axes, layers)
        axes.set_ylabel("KL(T‖F) that goes away, %")

    share, part = max((one.swap, one.part) for one in layers if one.swap is not None)
    return draw(paint, 2.9, f"Bars: the error that goes away with one part right. {percent(share)} with {part}.")


def codes_error(bases: MergeBases) -> str:
    """||q|| / ||delta|| of each adapted weight: how loud 8-bit rounding is beside the adapter."""
    known = [(i, one.to_delta) for i, one in enumerate(bases.tensors) if one.to_delta]

    def paint(axes: Axes) -> None:
        places, values = zip(*known, strict=True)
        axes.plot(places, values, "o", color=FIRST, markersize=4.5)
        axes.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        axes.set_yscale("log")
        axes.set_ylim(*decade(min(*values, 1.0) / 1.5, max(*values, 1.0) * 1.5))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("adapted weight, in the model's order")
        axes.set_ylabel("‖q‖ / ‖delta‖ (log scale)")

    values = [value for _, value in known]
    alt = f"Size of 8-bit rounding beside the adapter's change in {len(known)} weights: from {figure(min(values))} to "
    return draw(paint, 2.9, f"{alt}{figure(max(values))}. 1 means as large as the change.")


def _parts(axes: Axes, layers: Sequence[Layer]) -> None:
    """A tick where a part's name fits: the embeddings, some blocks by number, the head."""
    short = [one.part.removeprefix("block ").replace("embeddings", "emb") for one in layers]
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda place, _: short[round(place)] if 0 <= round(place) < len(short) else "")
    )
    axes.set_xlabel("part of the model: embeddings, blocks by number, head")


def _named(bundle: BundleResult) -> list[int]:
    """Places of the parts that the origin names."""
    parts = bundle.origin.parts if bundle.origin else ()
    return [i for i, one in enumerate(bundle.layers) if one.part in parts]


def _worst(layers: Sequence[Layer], name: str) -> str:
    known = [(value, one.part) for one in layers if (value := getattr(one, name)) is not None]
    return f"Largest {name}: {max(known)[1]}, {figure(max(known)[0])}. " if known else ""


def _blame(bundle: BundleResult) -> str:
    return f"Named as the origin: {', '.join(bundle.origin.parts)}." if bundle.origin and bundle.origin.parts else ""
