"""The live report and the judge's page in headless Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rightrank.decision.run import decision_so_far
from rightrank.report.html import render_report
from rightrank.report.judge_page import judge_page
from rightrank.report.live_page import LivePage
from tests.report.chromium import CHROMIUM, FLAGS, sync_api
from tests.report.runs import made_up_run

pytestmark = [
    pytest.mark.trains,
    pytest.mark.draws,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]


@pytest.fixture
def page() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page(accept_downloads=True)
        browser.close()


def test_the_report_is_loaded_again_when_it_changes(page: Any, tmp_path: Path) -> None:
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    records, report, state = made_up_run(()), tmp_path / "report.html", ["running"]
    report.write_text(render_report(records, decision_so_far(records)), encoding="utf-8")
    with LivePage(report, lambda: state[0], seconds=0.2) as live:
        page.goto(live.url)
        frame = page.frame_locator("#report")
        first = frame.locator("h1").inner_text()
        page.locator("#state", has_text="running; this page follows").wait_for()
        records = made_up_run()
        report.write_text(render_report(records, decision_so_far(records)), encoding="utf-8")
        frame.locator("h1").filter(has_not_text=first).wait_for()
        state[0] = "done"
        page.locator("#state", has_text="done").wait_for()
    assert [text for text in complaints if "favicon" not in text] == []


def test_a_judge_clicks_through_and_saves(page: Any, tmp_path: Path) -> None:
    pairs = [
        {"id": f"p{n}", "prompt": f"prompt {n} </script><b>", "a": f"left {n}", "b": f"right {n}"} for n in range(3)
    ]
    file = tmp_path / "judge.html"
    file.write_text(judge_page(pairs), encoding="utf-8")
    page.goto(file.as_uri())
    assert page.locator("#prompt").inner_text() == "prompt 0 </script><b>"
    page.fill("#judge", "Ada")
    page.click("#choose-a")
    page.keyboard.press("2")
    page.click("#back")
    page.click("#choose-tie")
    page.click("#choose-b")
    assert page.locator("#progress").inner_text() == "3 of 3 judged"
    with page.expect_download() as download:
        page.click("#save")
    found = json.loads(Path(download.value.path()).read_text())
    assert found == {"judge": "Ada", "choices": {"p0": "a", "p1": "tie", "p2": "b"}}
