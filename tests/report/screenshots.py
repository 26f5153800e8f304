"""Screenshots of a run's report in Chromium: two widths, light and dark, and as printed.

    python -m tests.report.screenshots RUN --out shots             # all of them, full pages
    python -m tests.report.screenshots RUN --docs docs/images      # those of the documentation, small

`RUN` is a run folder; `rightrank report RUN` writes its report from the journal. Needs playwright, Pillow and a Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

WIDTHS = {"phone": 390, "desktop": 1280}
HEIGHT = {"phone": 844, "desktop": 1120}
SCHEMES = ("light", "dark")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
DOCS = {"report-desktop": ("desktop", "light"), "report-dark": ("desktop", "dark"), "report-phone": ("phone", "light")}


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium, closed at the end.

    Raises:
        RuntimeError: there is none on this machine.
    """
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        raise RuntimeError("there is no Chromium here; install one (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


def screenshot(
    browser: Any, report: Path, screen: str, scheme: str, *, full_page: bool = True, printed: bool = False
) -> bytes:
    """The report as PNG bytes on a `phone` or a `desktop`; `printed` emulates the style of print on the screen."""
    context = browser.new_context(
        viewport={"width": WIDTHS[screen], "height": HEIGHT[screen]},
        color_scheme=scheme,
    )
    page = context.new_page()
    page.goto(report.resolve().as_uri())
    if printed:
        page.emulate_media(media="print")
    image: bytes = page.screenshot(full_page=full_page)
    context.close()
    return image


def print_pdf(browser: Any, report: Path, path: Path) -> None:
    """Print the report to a PDF, as the browser's print dialogue does."""
    page = browser.new_page(viewport={"width": WIDTHS["desktop"], "height": HEIGHT["desktop"]})
    page.goto(report.resolve().as_uri())
    page.pdf(path=str(path), prefer_css_page_size=True, print_background=True)
    page.close()


def compressed(image: bytes) -> bytes:
    """The PNG with a palette of 256 colours, which keeps those of thin lines too."""
    from PIL import Image

    buffer = BytesIO()
    whole = Image.open(BytesIO(image)).convert("RGB")
    whole.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def all_screenshots(browser: Any, report: Path, folder: Path) -> list[Path]:
    """Every width and colour scheme, the printed style, the PDF, and its pages as images where `pdftoppm` is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for screen in WIDTHS:
        for scheme in SCHEMES:
            written.append(folder / f"{screen}-{scheme}.png")
            written[-1].write_bytes(compressed(screenshot(browser, report, screen, scheme)))
    written.append(folder / "printed.pdf")
    print_pdf(browser, report, written[-1])
    if shutil.which("pdftoppm"):
        subprocess.run(["pdftoppm", "-png", "-r", "80", str(written[-1]), str(folder / "printed")], check=True)
        written += sorted(folder.glob("printed-*.png"))
    else:
        written.append(folder / "printed.png")
        written[-1].write_bytes(compressed(screenshot(browser, report, "desktop", "light", printed=True)))
    return written


def docs_screenshots(browser: Any, report: Path, folder: Path) -> list[Path]:
    """The screenshots of the documentation: the first screen of the report."""
    written = []
    for name, (screen, scheme) in DOCS.items():
        written.append(folder / f"{name}.png")
        written[-1].write_bytes(compressed(screenshot(browser, report, screen, scheme, full_page=False)))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder with a report.html, or an HTML file")
    parser.add_argument("--out", type=Path, help="folder for all screenshots")
    parser.add_argument("--docs", type=Path, help="folder for the screenshots of the documentation")
    options = parser.parse_args()
    report = options.run if options.run.is_file() else options.run / "report.html"
    with chromium() as browser:
        written = all_screenshots(browser, report, options.out) if options.out else []
        written += docs_screenshots(browser, report, options.docs) if options.docs else []
    for path in written:
        print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
