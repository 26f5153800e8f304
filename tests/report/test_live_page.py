"""`watch --open`: the report in the browser follows the run, and nobody else is served."""

from __future__ import annotations

import os
import webbrowser
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import pytest

from rightrank.report.live_page import LivePage, live_page
from tests.commands import run

RUN = Path(__file__).parents[1] / "fixtures" / "runs" / "schema-3" / "run"


def answered(url: str, host: str | None = None) -> tuple[int, str]:
    """Status and text."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.netloc, timeout=10)
    try:
        connection.request("GET", parts.path, headers={} if host is None else {"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def fetched(url: str) -> str:
    return answered(url)[1]


def test_the_page_follows_the_file(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    with LivePage(report, lambda: "running") as page:
        assert 'src="report"' in fetched(page.url)
        assert "once the first training has ended" in fetched(page.url + "report")
        assert fetched(page.url + "state") == " running"
        report.write_text("<p>one")
        first = fetched(page.url + "state")
        os.utime(report, ns=(1, 1))
        assert fetched(page.url + "state") != first
        assert fetched(page.url + "report") == "<p>one"


@pytest.mark.parametrize(
    ("path", "host", "status"), [("/", None, 404), ("journal.jsonl", None, 404), ("", "evil.example", 403)]
)
def test_nothing_else_is_served(path: str, host: str | None, status: int, tmp_path: Path) -> None:
    with LivePage(tmp_path / "report.html", lambda: "running") as page:
        assert answered(urljoin(page.url, path), host) == (status, "")
    assert page.url.startswith("http://127.0.0.1:")


def test_the_page_runs_its_own_script_alone() -> None:
    assert "script-src 'sha256-" in live_page(2.0)
    assert "SECONDS" not in live_page(2.0)


def test_watch_opens_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(fetched(url)))
    monkeypatch.setattr("rightrank.cli.views.LAST_LOOK_SECONDS", 0.0)
    status, _, err = run(["watch", str(RUN), "--open"], capsys)
    assert status == 0
    assert 'id="report"' in opened[0]
    assert "this machine only" in err
