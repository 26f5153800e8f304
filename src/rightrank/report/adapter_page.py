"""The answer on the smallest adapter of one training: its table, its figure, and the page of a training by another program; with the templates of all pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rightrank.decision.adapter import format_share
from rightrank.report.figure import (
    INSTALL_HINT,
    RANK,
    Figure,
    compute_limits,
    draw_band,
    draw_points,
    draw_ring,
    draw_share_axis,
    is_matplotlib_installed,
    set_log_ticks,
)
from rightrank.report.format import format_metric_label, make_visible
from rightrank.schema.decision import AdapterAnswer, AdapterCandidate, LearningRateCandidate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENOUGH = {True: "yes", False: "no", None: "inconclusive"}  # by `is_within_margin` or `RankEvidence.non_inferior`
# Adapters that are worse than the reference by more margins are off the scale, so that the margin stays readable.
MAX_MARGINS = 6.0
METHODS = {"trained": "trained at that rank", "truncated": "truncated from the highest rank"}


def build_candidate_table(answer: AdapterAnswer, metric: str) -> list[list[str]]:
    """Return the candidate adapters as rows of text, heading first. Shares of the gain come before the differences, if there is a gain."""
    has_shares = any(candidate.share_kept is not None for candidate in answer.candidates)
    heading = ["rank", *["keeps", "at least"] * has_shares, metric, "worse by", "95% bound", "enough", "method"]
    return [heading, *(_build_candidate_row(candidate, answer, has_shares) for candidate in answer.candidates)]


def _build_candidate_row(candidate: AdapterCandidate, answer: AdapterAnswer, has_shares: bool) -> list[str]:
    is_reference = candidate.trial_id == answer.reference_id
    bound = "–" if candidate.difference_high is None else f"{candidate.difference_high:+.4f}"
    shares = [
        "" if share is None or is_reference else format_share(share)
        for share in (candidate.share_kept, candidate.share_kept_low)
    ]
    return [
        str(candidate.rank),
        *shares * has_shares,
        f"{candidate.value:.4f}",
        "reference" if is_reference else f"{candidate.difference:+.4f}",
        "" if is_reference else bound,
        ENOUGH[candidate.is_within_margin],
        candidate.method,
    ]


def get_whisker_ends(
    value: float, compared: AdapterCandidate | LearningRateCandidate, sign: int
) -> tuple[float, float]:
    """Return the ends of a whisker: the value that the paired difference is from, plus the bounds of the difference."""
    difference, low, high = compared.difference, compared.difference_low, compared.difference_high
    if difference is None or low is None or high is None:
        return value, value
    ends = value + sign * (low - difference), value + sign * (high - difference)
    return min(ends), max(ends)


def plot_adapters(
    answer: AdapterAnswer,
    adapters: Sequence[AdapterCandidate],
    metric: str,
    higher_is_better: bool,
) -> Figure:
    """Plot held-out values by rank of trained and truncated adapters.

    A whisker spans the 95% bounds of the paired difference, starting from the reference's value. An adapter is good enough if its
    whisker ends inside the band. The axis on the right has the share of the gain over the base.
    """
    sign = -1 if higher_is_better else 1
    reference = next(adapter.value - sign * adapter.difference for adapter in adapters)
    edge = reference + sign * answer.margin
    base = None if answer.gain is None or answer.has_no_gain else reference + sign * answer.gain.mean
    points = {a.trial_id: (a.rank, a.value, *get_whisker_ends(a.value, a, sign)) for a in adapters}
    visible = [adapter for adapter in adapters if adapter.difference <= MAX_MARGINS * answer.margin]
    off_scale_ranks = sorted({adapter.rank for adapter in adapters} - {adapter.rank for adapter in visible})
    off_scale_text = f" (off the scale: rank {', '.join(map(str, off_scale_ranks))})" if off_scale_ranks else ""
    chosen = next(adapter for adapter in adapters if adapter.trial_id == answer.trial_id)

    def draw(ax: Axes) -> None:
        draw_band(ax, reference, edge, "within the margin; whiskers: paired 95% bounds")
        draw_ring(ax, chosen.rank, chosen.value, f"exported: rank {chosen.rank}, {chosen.method}")
        for number, (method, label) in enumerate(METHODS.items()):
            series = sorted(points[adapter.trial_id] for adapter in adapters if adapter.method == method)
            if series:
                draw_points(ax, series, label, f"C{number}", "-" if method == "trained" else "--")
        set_log_ticks(ax, "x", [adapter.rank for adapter in adapters])
        ax.set_ylim(*compute_limits([reference, edge, *(v for a in visible for v in points[a.trial_id][1:])]))
        draw_share_axis(ax, base, reference)

    return Figure(
        name="adapters",
        title=f"Trained and truncated adapters by rank{off_scale_text}",
        x_label=RANK,
        y_label=format_metric_label(metric, higher_is_better),
        columns=("rank", "method", "value", "difference", "lower bound", "upper bound", "holds"),
        rows=[
            (a.rank, a.method, a.value, a.difference, a.difference_low, a.difference_high, ENOUGH[a.is_within_margin])
            for a in adapters
        ],
        draw=draw,
    )


def render_adapter_page(
    answer: AdapterAnswer, metric: str, higher_is_better: bool, config: Mapping[str, Any], training_settings: str
) -> str:
    """Render the page of the smallest adapter of a training by another program.

    Args:
        config: of the adapter that is handed over, in PEFT's names.
        training_settings: of the training, in the names of PEFT and transformers.
    """
    return (
        load_templates()
        .get_template("adapter.html")
        .render(
            answer=answer,
            candidates=build_candidate_table(answer, metric),
            figure=plot_adapters(answer, answer.candidates, metric, higher_is_better),
            figure_hint="" if is_matplotlib_installed() else INSTALL_HINT,
            config=config,
            training_settings=training_settings,
            has_files=False,
        )
    )


MAX_NUMBER_ROWS = 200  # in the report; the figure's CSV file has all rows


@cache
def load_templates(autoescape: bool = True) -> Environment:
    """Load the template environment. With `autoescape`, values are escaped and control characters made visible."""
    environment = Environment(
        loader=PackageLoader("rightrank.report", "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: make_visible(value) if autoescape and type(value) is str else value,
    )
    environment.globals |= {"max_numbers": MAX_NUMBER_ROWS, "style": read_asset("report.css")}
    environment.filters["cell"] = _format_cell
    return environment


def _format_cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


@cache
def read_asset(name: str) -> str:
    """Read a file from the templates folder."""
    return files("rightrank.report").joinpath("templates", name).read_text(encoding="utf-8").strip("\n")
