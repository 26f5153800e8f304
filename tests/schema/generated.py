"""Generate files from the table of settings and from the public names; run `python -m tests.schema.generated` to write them.

A test compares the files. `schema/keywords.py` types the keywords of `select_rank` and `plan`,
`docs/reference/settings.md` lists all settings, and `docs/reference/python.md` has the signatures.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from rightrank.schema.setting_table import Group, Row, Settings, list_rows
from rightrank.schema.settings import DTYPE_ALIASES, PlanSettings, SelectSettings

ROOT = Path(__file__).parents[2]
PYTHON_PAGE = ROOT / "docs" / "reference" / "python.md"
# A block of a signature, above the directive that shows the docstring on the site.
SIGNATURE = re.compile(r"```py\n(?:(?!```).)*\n```\n\n::: (rightrank[\w.]*)", re.DOTALL)
WRITTEN = {  # additional types that a keyword allows
    "columns": "Mapping[str, str] | Sequence[str]",
    "memory_bytes": "int | str",
}


def format_keywords() -> str:
    """Return the content of `schema/keywords.py`."""
    return f'''"""The keywords of `select_rank` and `plan`: the settings with an option. Made from their table by `make generated`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict


class SelectKeywords(TypedDict, total=False):
    """The settings that most selections use. Pass all others through `settings`."""

{_format_keyword_class(SelectSettings)}

class PlanKeywords(TypedDict, total=False):
    """The settings that most plans use. Pass all others through `settings`."""

{_format_keyword_class(PlanSettings).rstrip()}
'''


def _format_keyword_class(kind: type[Settings]) -> str:
    names = (name for name, row in list_rows(kind).items() if row.option)
    return "".join(f"    {name}: {_format_type(name, kind.model_fields[name].annotation)}\n" for name in names)


def _format_type(name: str, hint: Any) -> str:
    if name in WRITTEN:
        return WRITTEN[name]
    kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    return " | ".join(_format_kind(kind) for kind in kinds if kind is not NoneType)


def _format_kind(kind: Any) -> str:
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0].__name__
        return f"Sequence[{inner}] | {inner}"
    if get_origin(kind) is Literal:
        choices = [*get_args(kind), *(DTYPE_ALIASES if "bfloat16" in get_args(kind) else ())]
        return "Literal[" + ", ".join(f'"{choice}"' for choice in choices) + "]"
    return str(kind.__name__)


def format_page() -> str:
    """Return the content of `docs/reference/settings.md`."""
    sections = []
    for group in Group:
        rows = {name: row for name, row in list_rows(SelectSettings).items() if row.group is group}
        lines = "\n".join(
            f"| `{name}` | {format_default(row.default)} | {_format_meaning(row)} |" for name, row in rows.items()
        )
        sections.append(f"## {group.value}\n\n| name | default | meaning |\n|---|---|---|\n{lines}\n")
    return f"""# Settings

Give a setting in a YAML file (`--config FILE`), as `--set name=value`, or by the option of `rightrank select` that has its name.
A run can continue with other values of those marked (c); others need another run.

{chr(10).join(sections)}"""


def _format_meaning(row: Row) -> str:
    return row.help + (" (c)" if row.continuable or not row.identity else "")


def format_default(default: object) -> str:
    if default is None or default == "":
        return "–"
    if isinstance(default, tuple):
        return ", ".join(map(format_default, default)) or "none"
    return f"{default:g}" if isinstance(default, float) else str(default)


def format_python_page() -> str:
    """Return the content of `docs/reference/python.md`, with the signatures of the source."""
    text = PYTHON_PAGE.read_text(encoding="utf-8")
    return SIGNATURE.sub(lambda match: f"```py\n{format_signatures(match[1])}\n```\n\n::: {match[1]}", text)


def format_signatures(name: str) -> str:
    """Format the call and the purpose of a function, of a class with its fields, or of each public function of a module."""
    module, _, last = name.rpartition(".")
    tree = ast.parse(inspect.getsource(getattr(importlib.import_module(module), last)))
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"]
    return "\n".join(_format_call(node) for node in nodes)


def _format_call(node: ast.FunctionDef | ast.ClassDef) -> str:
    """Format the names and defaults; `help` and the site have the types."""
    is_class = isinstance(node, ast.ClassDef)
    parameters = ", ".join(_iterate_fields(node)) if is_class else _format_parameters(node.args)
    returned = (
        f"\N{NO-BREAK SPACE}->\N{NO-BREAK SPACE}{ast.unparse(node.returns)}" if not is_class and node.returns else ""
    )
    call = textwrap.fill(f"{node.name}({parameters}){returned}", 110, subsequent_indent="    ")
    purpose = (ast.get_docstring(node) or "").partition("\n")[0].partition(". ")[0].rstrip(".")
    return f"# {purpose}\n{call}"


def _format_parameters(arguments: ast.arguments) -> str:
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments).replace("=lambda _: None", "=...")


def _iterate_fields(node: ast.ClassDef) -> Iterator[str]:
    """Yield the fields that a caller may give, with their defaults."""
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and not re.search("init=False|exclude=True", ast.unparse(field)):
            name = ast.unparse(field.target)
            default = ast.unparse(field.value) if field.value else ""
            default = "[]" if "default_factory=list" in default else default
            yield "*" if name == "_" else f"{name}={default}" if default else name


GENERATED: dict[Path, Callable[[], str]] = {
    ROOT / "src" / "rightrank" / "schema" / "keywords.py": format_keywords,
    ROOT / "docs" / "reference" / "settings.md": format_page,
    PYTHON_PAGE: format_python_page,
}

if __name__ == "__main__":
    for file, write_text in GENERATED.items():
        file.write_text(write_text(), encoding="utf-8")
