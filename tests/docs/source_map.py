"""The map of the source in CONTRIBUTING.md, from the first sentence of each module.

python -m tests.docs.source_map     # writes it anew after a file was added, moved or removed
"""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "rightrank"
PAGE = ROOT / "CONTRIBUTING.md"
SLOT = re.compile(r"(<!-- map -->\n).*?(<!-- end -->)", re.DOTALL)


def layers() -> list[str]:
    """The names at the top of the package, top layer first, as the layering check has them."""
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter", encoding="utf-8")
    return re.findall(r"\w+", contracts["importlinter:contract:layers"]["layers"])


def files_of(layer: str) -> list[Path]:
    module = SOURCE / f"{layer}.py"
    return [module] if module.exists() else sorted((SOURCE / layer).rglob("*.py"))


def line_of(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    sentence = (
        re.split(r"(?<=\.)\s(?=[A-Z])", " ".join(docstring.split("\n\n")[0].split()) + " ")[0].strip().rstrip(".")
    )
    name = file.relative_to(SOURCE).as_posix().removesuffix("__init__.py")
    return f"| `{name}` | {sentence} |"


def source_map() -> str:
    rows = [line_of(file) for layer in layers() for file in files_of(layer)]
    return "\n".join(["| file | what it is |", "|---|---|", *rows]) + "\n"


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(SLOT.sub(lambda found: found[1] + source_map() + found[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()
