"""The answer on the smallest adapter of one training: its table, its figure, and the page of a training by another program; with the templates of all pages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rightrank.decision.adapter import format_share, is_shown_enough
from rightrank.report.figures import INSTALL_HINT, is_matplotlib_installed, plot_adapters
from rightrank.report.format import ENOUGH, make_visible
from rightrank.schema.results import AdapterAnswer, AdapterCandidate


def build_candidate_table(answer: AdapterAnswer, metric: str) -> list[list[str]]:
    """Return the candidate adapters as rows of text, heading first.

    Shares of the gain come before the differences, if there is a gain. The method is in the last column, unless every lower rank is truncated.
    """
    has_shares = any(candidate.share_kept is not None for candidate in answer.candidates)
    has_methods = any(candidate.method == "trained" for candidate in answer.candidates[1:])
    heading = ["rank", *["keeps", "at least"] * has_shares, metric, "worse by", "95% bound", "enough"]
    rows = [_build_candidate_row(candidate, answer, has_shares) for candidate in answer.candidates]
    methods = ["method", *(candidate.method for candidate in answer.candidates)]
    return [[*row, *[method] * has_methods] for row, method in zip([heading, *rows], methods, strict=True)]


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
        ENOUGH[is_shown_enough(candidate, answer)],
    ]


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
    style = files("rightrank.report").joinpath("templates", "report.css").read_text(encoding="utf-8")
    environment.globals |= {"max_numbers": MAX_NUMBER_ROWS, "style": style.strip("\n")}
    environment.filters["cell"] = _format_cell
    return environment


def _format_cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
