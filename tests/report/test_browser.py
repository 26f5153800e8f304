"""Test the report in headless Chromium: it works, makes no requests, and is readable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rightrank.decision.run_answers import decide_if_possible, decide_run
from rightrank.report.answer import build_answers
from rightrank.report.html import build_figures, render_report
from rightrank.schema.events import Records
from rightrank.schema.results import Decision
from tests.report.chromium import CHROMIUM, FLAGS
from tests.report.runs import make_answered_run, make_run

pytestmark = [
    pytest.mark.trains,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)"),
]

RUNS = {
    1: lambda: make_run(()),
    9: lambda: make_run(diverged=[(64, 3e-3)]),
    201: lambda: make_run((1, 2, 4, 8, 16, 32, 64, 128), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (0, 1, 2, 3, 4)),
}


@dataclass
class PageEvents:
    """What a page did."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def render_page(records: Records, decision: Decision | None) -> str:
    return render_report(records, build_answers(records, decision), build_figures(records, decision))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("reports")
    files_by_count = {}
    for count, make in RUNS.items():
        records = make()
        assert len(records.outcomes) == count
        files_by_count[count] = folder / f"{count}.html"
        files_by_count[count].write_text(render_page(records, decide_if_possible(records)), encoding="utf-8")
    return files_by_count


def open_page(browser: Any, file: Path, **options: Any) -> PageEvents:
    page = browser.new_context(**options).new_page()
    events = PageEvents(page)
    page.on("console", lambda message: events.complaints.append(message.text))
    page.on("pageerror", lambda error: events.complaints.append(str(error)))
    page.on("request", lambda request: events.requests.append(request.url))
    page.goto(file.as_uri())
    return events


SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1200, "height": 900}},
    "dark phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}


@pytest.mark.parametrize("count", RUNS)
@pytest.mark.parametrize("screen", SCREENS)
def test_no_error_no_request_no_overflow_and_no_barrier(
    browser: Any, files: dict[int, Path], count: int, screen: str
) -> None:
    axe: Any = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-core is not installed")
    events = open_page(browser, files[count], **SCREENS[screen])
    page = events.page
    assert (page.locator(".drawing img").count() > 0) == (count > 1)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # axe runs by evaluating its source in the page, which this page's policy allows to the debugger alone
    violations = axe.Axe().run(page).response["violations"]
    serious = [rule["id"] for rule in violations if rule["impact"] in ("serious", "critical")]
    assert serious == []
    assert events.complaints == []
    assert [url for url in events.requests if not url.startswith(("file:", "data:"))] == []


COVERED = """() => {
    const texts = [...document.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
    return texts.flatMap(([name, a], i) => texts.slice(i + 1)
        .filter(([, b]) => a.left < b.right && b.left < a.right && a.top < b.bottom - 1 && b.top < a.bottom - 1)
        .map(([other]) => `${name} / ${other}`));
}"""
LETTERS = """() => [...document.querySelectorAll("text")].map((text) =>
    parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a)"""
SCALES = """() => [...document.querySelectorAll(".drawing img")].map((image) => image.width / image.naturalWidth)"""


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_texts_of_a_plot_are_readable_and_cover_no_other(browser: Any, tmp_path: Path, width: int) -> None:
    records = make_answered_run(direct=(4, 16))
    higher = {"metric": "exact_match_of_answers", "higher_is_better": True}
    records.started = records.started.model_copy(update=higher)
    # The numbers of the axis have seven characters.
    records.outcomes = [
        outcome.model_copy(
            update={
                "metrics": {"exact_match_of_answers": 10.613 + index / 1e4},
                "example_losses": [],
                "example_tokens": [],
            }
        )
        for index, outcome in enumerate(records.outcomes)
    ]
    decision = decide_run(records).model_copy(update={"margin": 1e-4})
    file = tmp_path / "report.html"
    file.write_text(render_page(records, decision), encoding="utf-8")
    page = open_page(browser, file, viewport={"width": width, "height": 900}).page
    scales = page.evaluate(SCALES)
    drawings = [figure.svg for figure in build_figures(records, decision)]
    assert len(scales) == len(drawings)
    assert "10.613" in drawings[0]
    for drawing, scale in zip(drawings, sorted(scales), strict=True):  # all have the same width
        page.set_content(drawing.partition("?>")[2])
        assert page.evaluate(COVERED) == []
        assert scale * min(page.evaluate(LETTERS)) >= (8 if width == 320 else 10)


def test_texts_from_data_run_nothing(browser: Any, tmp_path: Path) -> None:
    nasty = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=2>\x00"
    records = make_run(model=nasty)
    file = tmp_path / "nasty.html"
    decision = decide_run(records).model_copy(update={"metric": nasty, "sentence": nasty})
    file.write_text(render_page(records, decision), encoding="utf-8")
    events = open_page(browser, file)
    events.page.mouse.move(400, 500)
    assert events.page.evaluate("window.pwned") is None
    assert events.complaints == []
