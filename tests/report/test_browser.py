"""The report in headless Chromium: it works, it asks for nothing, and people can read it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from rightrank.decision.records import answers_of, decide_run, decision_so_far
from rightrank.report.figure import metric_axis
from rightrank.report.figures import figures_of
from rightrank.report.html import render_report
from tests.report.chromium import CHROMIUM, FLAGS
from tests.report.runs import answered_run, made_up_run
from tests.report.screenshots import docs_screenshots

pytestmark = [
    pytest.mark.trains,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian: apt-get install chromium)"),
]

RUNS = {
    1: lambda: made_up_run(()),
    9: lambda: made_up_run(diverged=[(64, 3e-3)]),
    201: lambda: made_up_run((1, 2, 4, 8, 16, 32, 64, 128), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (0, 1, 2, 3, 4)),
}


@dataclass
class Seen:
    """What a page did."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


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
    found = {}
    for count, make in RUNS.items():
        records = make()
        assert len(records.outcomes) == count
        found[count] = folder / f"{count}.html"
        found[count].write_text(render_report(records, answers_of(records, decision_so_far(records))), encoding="utf-8")
    return found


def opened(browser: Any, file: Path, **options: Any) -> Seen:
    page = browser.new_context(**options).new_page()
    seen = Seen(page)
    page.on("console", lambda message: seen.complaints.append(message.text))
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(file.as_uri())
    return seen


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
    seen = opened(browser, files[count], **SCREENS[screen])
    page = seen.page
    assert (page.locator(".drawing svg").count() > 0) == (count > 1)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # axe runs by evaluating its source in the page, which this page's policy allows to the debugger alone
    found = axe.Axe().run(page).response["violations"]
    serious = [rule["id"] for rule in found if rule["impact"] in ("serious", "critical")]
    assert serious == []
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith(("file:", "data:"))] == []


def test_trials_are_sorted_by_their_heads_and_bands_are_in_the_legend(browser: Any, files: dict[int, Path]) -> None:
    page = opened(browser, files[9]).page
    head = page.locator("table.sortable th button", has_text="held-out")
    for order in ("ascending", "descending"):
        head.click()
        assert page.locator(f'table.sortable th[aria-sort="{order}"]').inner_text().startswith("held-out")
        values = [
            float(text) for text in page.locator("table.sortable tbody td:nth-child(4)").all_inner_texts() if text
        ]
        assert values == sorted(values, reverse=order == "descending")
    assert "within the margin of the best" in page.locator("#figure-rank_curve .legend").inner_text()
    assert page.locator("button.copy").count() == page.locator("pre.command, pre.code").count() > 0


@pytest.mark.parametrize("count", RUNS)
def test_without_scripts_the_drawings_are_there(browser: Any, files: dict[int, Path], count: int) -> None:
    page = opened(browser, files[count], java_script_enabled=False).page
    stills = page.locator(".drawing > svg")
    for index in range(stills.count()):
        assert stills.nth(index).is_visible()
    assert (stills.count() > 0) == (count > 1)
    assert not page.locator("#margin").count() or not page.locator("#margin").is_visible()


A4_WIDTH = 703  # CSS pixels between margins of 12 mm
OVERFLOWING = """() => [...document.querySelectorAll("main, section, pre, table, .scroll, figure, svg")]
    .filter((e) => e.getClientRects().length && getComputedStyle(e).position !== "absolute")
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1
        || (getComputedStyle(e).overflow !== "visible" && !(e instanceof SVGElement) && e.scrollHeight > e.clientHeight + 1))
    .map((e) => e.tagName + "." + e.className + "#" + e.id)"""


@pytest.mark.parametrize("count", [9, 201])
def test_it_prints_whole(browser: Any, files: dict[int, Path], count: int, tmp_path: Path) -> None:
    page = opened(browser, files[count], viewport={"width": A4_WIDTH, "height": 1000}).page
    page.emulate_media(media="print")
    assert page.evaluate(OVERFLOWING) == []
    for section in ("rank_curve", "learning_curves", "memory"):
        assert page.locator(f"#figure-{section}").is_visible()
    assert page.locator("#untested").is_visible()
    assert page.locator(".legend").first.is_visible()
    page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", (tmp_path / "report.pdf").read_bytes())) <= 4


@pytest.mark.parametrize("screen", SCREENS)
def test_a_legend_wraps_and_hides_a_series(browser: Any, files: dict[int, Path], screen: str) -> None:
    page = opened(browser, files[9], **SCREENS[screen]).page
    figure = page.locator("#figure-learning_curves")
    entries = figure.locator(".legend button")
    assert entries.all_inner_texts() == ["rank 1", "rank 4", "rank 16", "rank 64"]
    widths = page.evaluate(
        "[...document.querySelectorAll('.legend, .plot-title')].map((e) => e.scrollWidth - e.clientWidth)"
    )
    assert set(widths) == {0}
    before = figure.locator(".drawing > svg").inner_html()
    entries.nth(1).click()
    assert entries.nth(1).get_attribute("aria-pressed") == "false"
    assert figure.locator(".drawing > svg").inner_html() != before
    assert figure.locator(".series.off").count() == 2  # held-out and training
    entries.nth(1).click()
    assert figure.locator(".drawing > svg").inner_html() == before


@pytest.mark.parametrize("screen", SCREENS)
def test_a_point_shows_its_numbers_inside_the_page(browser: Any, files: dict[int, Path], screen: str) -> None:
    page = opened(browser, files[9], **SCREENS[screen]).page
    figure = page.locator("#figure-rank_curve")
    values = [float(text) for text in figure.locator(".series").first.get_attribute("data-y").split()]
    points = figure.locator(".series circle")
    for index in range(points.count()):
        points.nth(index).hover(force=True)
        text = figure.locator(".spot").inner_text()
        assert f"LoRA rank: {(1, 4, 16, 64)[index]}\n" in text
        assert f"held-out loss, nats (lower is better): {values[index]:.5g}" in text
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("h1").hover()
    assert not figure.locator(".spot").is_visible()


COVERED = """() => [...document.querySelectorAll(".drawing > svg")].flatMap((svg) => {
    const texts = [...svg.querySelectorAll("text")].map((text) => [text.textContent, text.getBoundingClientRect()]);
    return texts.flatMap(([name, a], i) => texts.slice(i + 1)
        .filter(([, b]) => a.left < b.right && b.left < a.right && a.top < b.bottom - 1 && b.top < a.bottom - 1)
        .map(([other]) => `${name} / ${other}`));
})"""


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_no_text_of_a_plot_covers_another(browser: Any, tmp_path: Path, width: int) -> None:
    records = answered_run(direct=(4, 16))
    made = decide_run(records)
    narrow = metric_axis("exact_match_of_answers", True, (10.6118, 10.6142))  # its numbers have seven characters
    figures = [replace(figure, name=f"{figure.name}_2", y=narrow) for figure in figures_of(records, made)]
    file = tmp_path / "report.html"
    file.write_text(render_report(records, answers_of(records, made), figures), encoding="utf-8")
    page = opened(browser, file, viewport={"width": width, "height": 900}).page
    assert page.locator(".drawing > svg text", has_text="10.6125").count() == len(figures)
    assert page.evaluate(COVERED) == []


def test_screenshots_of_the_documentation_are_small(browser: Any, files: dict[int, Path], tmp_path: Path) -> None:
    written = docs_screenshots(browser, files[9], tmp_path)
    assert [path.name for path in written] == ["report-desktop.png", "report-dark.png", "report-phone.png"]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000


def test_texts_from_data_run_nothing(browser: Any, tmp_path: Path) -> None:
    nasty = "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=2>\x00"
    records = made_up_run(model=nasty)
    file = tmp_path / "nasty.html"
    made = decide_run(records).model_copy(update={"metric": nasty, "sentence": nasty})
    file.write_text(render_report(records, answers_of(records, made)), encoding="utf-8")
    seen = opened(browser, file)
    seen.page.mouse.move(400, 500)
    assert seen.page.evaluate("window.pwned") is None
    assert seen.complaints == []
