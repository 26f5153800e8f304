"""Screenshots of a run's report in Chromium: two widths, light and dark.

    python -m tests.report.screenshots RUN --out shots             # all of them, full pages
    python -m tests.report.screenshots RUN --docs docs/images      # those of the documentation, small

`RUN` is a run folder; `rightrank report RUN` writes its report from the journal. Needs playwright, Pillow and a Chromium.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

WIDTHS = {"phone": 390, "desktop": 1280}
HEIGHT = {"phone": 844, "desktop": 1120}
SCHEMES = ("light", "dark")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
DOCS = {"report-desktop": ("desktop", "light")}


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


def take_screenshot(browser: Any, report: Path, screen: str, scheme: str, *, full_page: bool = True) -> bytes:
    """Return the report as PNG bytes on a `phone` or a `desktop`."""
    context = browser.new_context(
        viewport={"width": WIDTHS[screen], "height": HEIGHT[screen]},
        color_scheme=scheme,
    )
    page = context.new_page()
    page.goto(report.resolve().as_uri())
    image: bytes = page.screenshot(full_page=full_page)
    context.close()
    return image


def compress(image: bytes) -> bytes:
    """Reduce the PNG to a palette of 256 colours, which keeps the colours of thin lines."""
    from PIL import Image

    buffer = BytesIO()
    picture = Image.open(BytesIO(image)).convert("RGB")
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def take_all_screenshots(browser: Any, report: Path, folder: Path) -> list[Path]:
    """Take every width and colour scheme."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for screen in WIDTHS:
        for scheme in SCHEMES:
            written.append(folder / f"{screen}-{scheme}.png")
            written[-1].write_bytes(compress(take_screenshot(browser, report, screen, scheme)))
    return written


def take_docs_screenshots(browser: Any, report: Path, folder: Path) -> list[Path]:
    """Take the screenshots of the documentation: the first screen of the report."""
    written = []
    for name, (screen, scheme) in DOCS.items():
        written.append(folder / f"{name}.png")
        written[-1].write_bytes(compress(take_screenshot(browser, report, screen, scheme, full_page=False)))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with a report.html, or an HTML file")
    parser.add_argument("--out", type=Path, help="folder for all screenshots")
    parser.add_argument("--docs", type=Path, help="folder for the screenshots of the documentation")
    options = parser.parse_args()
    report = options.run if options.run.is_file() else options.run / "report.html"
    with open_chromium() as browser:
        written = take_all_screenshots(browser, report, options.out) if options.out else []
        written += take_docs_screenshots(browser, report, options.docs) if options.docs else []
    for path in written:
        print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
