"""report.html: one self-contained page. No script, no network: styles and plots stand inside."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import jinja2
from markupsafe import Markup

from exporter.parity.result import BundleResult, Verification
from exporter.report import figures, plots

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
    environment.filters["visible"] = visible
    environment.globals.update(
        bundle_name=figures.bundle_name,
        statistic_name=figures.statistic_name,
        judged=figures.judged,
        beyond=figures.beyond,
        killed=figures.killed,
        largest_stage=figures.largest_stage,
        weak_tensors=figures.weak_tensors,
        names=figures.NAMES,
        pair_title=figures.pair_title,
        nearest=figures.nearest,
    )
    numbers = count()
    drawings = [_drawings(bundle, numbers) for bundle in verification.bundles]
    return environment.get_template("report.html.j2").render(v=verification, drawings=drawings)


def visible(text: str) -> str:
    """A token as it can be seen: line ends and tabs as signs."""
    return text.replace("\n", "⏎").replace("\t", "⇥")


def _drawings(bundle: BundleResult, numbers: "count[int]") -> list[Drawing]:
    wanted: list[tuple[str, str, bool, Callable[[], str]]] = [
        (
            "How far each token is",
            "Tokens by their KL divergence. The bundle should be no further from the reference than the truth is.",
            bool(bundle.histograms),
            partial(plots.kl_distribution, bundle),
        ),
        (
            "Where the error comes from",
            "Each step's share of the error between truth and bundle. A negative share takes back another's error.",
            any(stage.share is not None for stage in bundle.stages),
            partial(plots.stage_ladder, bundle),
        ),
        (
            "The adapter in each weight",
            "1 means that the weight carries the adapter's change exactly once. Bars: four standard errors.",
            any(p.share is not None for p in bundle.projections),
            partial(plots.projections, bundle),
        ),
        (
            "Along the document",
            "Mean KL by position: a fault in positions or in the cache grows with the distance from the start.",
            len(bundle.by_position) > 1,
            partial(plots.kl_by_position, bundle),
        ),
        (
            "Prefill against decoding and padding",
            "The same tokens fed in other ways must give the same logits.",
            bool(bundle.cache),
            partial(plots.cache_checks, bundle),
        ),
    ]
    return [
        Drawing(title, explanation, Markup(_unique(draw(), next(numbers))))
        for title, explanation, there, draw in wanted
        if there
    ]


def _unique(svg: str, number: int) -> str:
    """Ids of several SVGs share one page: give each drawing its own."""
    svg = re.sub(r'\bid="', f'id="d{number}-', svg)
    svg = re.sub(r'href="#', f'href="#d{number}-', svg)
    return re.sub(r"url\(#", f"url(#d{number}-", svg)
