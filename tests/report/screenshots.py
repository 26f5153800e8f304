"""Screenshots of a run's report in Chromium: two widths, light and dark.

    python -m tests.report.screenshots RUN --out docs/images      # report-desktop.png is that of the documentation

`RUN` is a run folder; `rightrank report RUN` writes its report from the journal. Needs playwright and a Chromium.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

WIDTHS = {"phone": 390, "desktop": 1280}
HEIGHT = {"phone": 844, "desktop": 1120}
SCHEMES = ("light", "dark")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextmanager
def open_chromium() -> Iterator[Any]:
    """Open a headless Chromium, and close it at the end.

    Raises:
        RuntimeError: this machine has no Chromium.
    """
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise RuntimeError("there is no Chromium here; install one (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


def take_screenshot(browser: Any, report: Path, screen: str, scheme: str) -> bytes:
    """Return the report as PNG bytes on a `phone` or a `desktop`."""
    context = browser.new_context(
        viewport={"width": WIDTHS[screen], "height": HEIGHT[screen]},
        color_scheme=scheme,
    )
    page = context.new_page()
    page.goto(report.resolve().as_uri())
    image: bytes = page.screenshot()
    context.close()
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with a report.html")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with open_chromium() as browser:
        for screen, scheme in product(WIDTHS, SCHEMES):
            name = f"report-{screen}.png" if scheme == "light" else f"report-{screen}-{scheme}.png"
            (options.out / name).write_bytes(take_screenshot(browser, options.run / "report.html", screen, scheme))


if __name__ == "__main__":
    main()
