"""report.html: one self-contained page. No script, no network: styles and plots stand inside."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import jinja2
from markupsafe import Markup

from exporter.parity.result import BundleResult, MergeBases, Verification
from exporter.report import advice, figures, layer_plots, plots

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True, slots=True)
class Drawing:
    title: str
    explanation: str
    svg: Markup


def html_page(verification: Verification) -> str:
    """The whole page. Texts from models and prompts are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["figure"] = figures.figure
    environment.filters["percent"] = figures.percent
    environment.filters["source"] = figures.source_name
    environment.filters["visible"] = visible
    environment.globals.update(f=figures, advice=advice)
    numbers = count()
    drawings = [_numbered(_drawings(bundle), numbers) for bundle in verification.bundles]
    bases = verification.merge_bases
    onto = _numbered(_onto_drawings(bases), numbers) if bases is not None else []
    names = figures.bundle_names(verification.bundles)
    return environment.get_template("report.html.j2").render(v=verification, names=names, drawings=drawings, onto=onto)


def _numbered(drawings: Sequence[Drawing], numbers: "count[int]") -> list[Drawing]:
    """The drawings with ids of their own: several SVGs share one page."""
    return [replace(one, svg=Markup(_unique(one.svg, next(numbers)))) for one in drawings]


def _onto_drawings(bases: MergeBases) -> list[Drawing]:
    """What 8 bits do to the base, and how loud that is beside the adapter."""
    found = [
        Drawing(
            f"What 8 bits do, {chain}",
            "Each step's share of the distance from the truth to the 8-bit reference.",
            Markup(plots.stage_ladder(bases.stages, chain)),
        )
        for chain in plots.chains(bases.stages)
    ]
    if any(one.to_delta for one in bases.tensors):
        words = "‖q‖ / ‖delta‖ of each adapted weight, q being what 8-bit rounding takes away. Dotted: as large."
        found.append(Drawing("8-bit rounding beside the adapter", words, Markup(layer_plots.codes_error(bases))))
    return found


def visible(text: str) -> str:
    """A token as it can be seen: line ends and tabs as signs, what has no sign (or turns the text around) by number."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in text)


def _drawings(bundle: BundleResult) -> list[Drawing]:
    """What there is to draw, in the order of a reader's questions: how far, from which stage, from which layer."""
    found: list[tuple[str, str, str]] = []
    if any(sum(histogram.counts) for histogram in bundle.histograms):
        found.append(
            (
                "How far each token is",
                "The bundle should be no further from the reference than the truth is. Triangles: means. Dashed: the "
                "limits on means.",
                plots.kl_distribution(bundle),
            )
        )
    found += [
        (
            f"Where the error comes from, {chain}",
            "Each step's share of the error. A negative share takes back another step's error.",
            plots.stage_ladder(bundle.stages, chain),
        )
        for chain in plots.chains(bundle.stages)
    ]
    if any(p.share is not None and p.error is not None for p in bundle.projections):
        found.append(
            (
                "The adapter, layer by layer",
                "1: the weight carries the adapter's change exactly once. Bars: four standard errors. Dashed: limits.",
                plots.projections(bundle),
            )
        )
    if any(one.local or one.accumulated or one.graph for one in bundle.layers):
        found.append(
            (
                "The error, layer by layer",
                "A part that is wrong stands out alone. What accumulates is what the next part sees. No point: exact.",
                layer_plots.layer_curve(bundle),
            )
        )
    if any(one.swap is not None for one in bundle.layers):
        found.append(
            (
                "What one layer put right would bring",
                "The weights' error that goes away when this part alone is the truth's. Below 0: it cancels another's.",
                layer_plots.layer_swaps(bundle),
            )
        )
    if len(bundle.by_position) > 1:
        found.append(
            (
                "Along the document",
                "A fault in positions or in the cache grows with the distance from the start.",
                plots.kl_by_position(bundle),
            )
        )
    if bundle.cache:
        found.append(
            (
                "Prefill against decoding and padding",
                "The same tokens fed in other ways must give the same logits.",
                plots.cache_checks(bundle),
            )
        )
    return [Drawing(title, explanation, Markup(svg)) for title, explanation, svg in found]


def _unique(svg: str, number: int) -> str:
    """Ids of several SVGs share one page: give each drawing its own."""
    svg = re.sub(r'\bid="', f'id="d{number}-', svg)
    svg = re.sub(r'href="#', f'href="#d{number}-', svg)
    return re.sub(r"url\(#", f"url(#d{number}-", svg)
