"""Build the documentation as a site without warnings, with every page reachable and every public name included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import rightrank

pytestmark = pytest.mark.trains

ROOT = Path(__file__).parents[2]
NOT_IN_THE_REFERENCE = {"__version__"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert completed.returncode == 0, completed.stderr[-2000:]
    assert completed.stderr.strip() == ""
    return folder


def test_every_page_is_in_the_navigation(site: Path) -> None:
    first = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix().removesuffix("index")
        address = f"{name.rstrip('/')}/" if name else "."
        assert (site / address / "index.html").is_file()
        assert f'href="{address}"' in first, f"{name} is not in the navigation of mkdocs.yml"


def test_the_reference_has_the_public_names(site: Path) -> None:
    text = (site / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    missing = {name for name in rightrank.__all__ if f'id="rightrank.{name}"' not in text}
    assert missing == NOT_IN_THE_REFERENCE


def test_the_site_asks_nothing_of_others(site: Path) -> None:
    """Check that no font, script or style comes from another host."""
    text = (site / "index.html").read_text(encoding="utf-8")
    assert 'src="http' not in text
    assert not [
        tag
        for tag in text.split("<link")[1:]
        if "stylesheet" in tag.split(">")[0] and 'href="http' in tag.split(">")[0]
    ]
