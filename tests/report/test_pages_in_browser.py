"""The judge's page in headless Chromium."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rightrank.plugins.judge.pairs import judge_page
from tests.report.chromium import CHROMIUM, FLAGS, sync_api

pytestmark = [
    pytest.mark.trains,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]


@pytest.fixture
def page() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page(accept_downloads=True)
        browser.close()


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
