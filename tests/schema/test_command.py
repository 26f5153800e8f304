"""Test that every setting survives the command that repeats a run."""

from __future__ import annotations

import shlex
from typing import Any, Literal, get_args, get_origin

import click
from hypothesis import given
from hypothesis import strategies as st

from rightrank.cli import cli
from rightrank.cli.options import gather_settings
from rightrank.schema.setting_table import is_list_type, list_rows
from rightrank.schema.settings import SelectSettings, build_reproduce_command
from tests.commands import COMMANDS
from tests.examples import limit_examples
from tests.schema.generated import GENERATED

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12) | st.sampled_from(
    ["layers.0", "1e3"]
)
PLAIN_TEXT = st.from_regex(r"[a-z][a-z0-9_.,= -]{0,12}", fullmatch=True)
VALUES: dict[str, st.SearchStrategy[Any]] = {  # values of settings that allow less than their type
    "columns": st.lists(st.tuples(PLAIN_TEXT, TEXT).map("=".join), min_size=1, max_size=3).filter(
        lambda entries: all(entry.partition("=")[0] and entry.partition("=")[2] for entry in entries)
    ),
    "device": st.sampled_from(["cpu", "cuda", "cuda:3", "mps"]),
    "peft_options": st.fixed_dictionaries(
        {}, optional={"lora_bias": st.booleans(), "layers_pattern": TEXT, "qalora_group_size": st.integers(1, 64)}
    ),
    "metric": st.sampled_from(["accuracy", "max:wins=scores 1,2.py:wins", "reward=my scores.py:reward"]),
    "metrics": st.lists(
        st.sampled_from(["accuracy", "f1", "min:losses=scores 1,2.py:losses", "reward=my scores.py:reward"]),
        min_size=1,
        unique=True,
    ),
    "memory_bytes": st.integers(2**20, 2**53),
    "budget_hours": st.floats(1e-6, 1e6),
    "margin": st.sampled_from(["1%", "2.5%", 0.005, 3.0]),
    "test_fraction": st.floats(0, 0.7),
    "validation_fraction": st.floats(0.001, 0.7),
}


def draw_values(name: str) -> st.SearchStrategy[Any]:
    if name in VALUES:
        return VALUES[name]
    info = SelectSettings.model_fields[name]
    hint, bounds = info.annotation, {}
    for limit in info.metadata:  # Gt, Ge, Lt and Le of annotated_types
        bounds |= {key: getattr(limit, key) for key in ("gt", "ge", "lt", "le") if hasattr(limit, key)}
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if is_list_type(hint):
        inner = next(kind_option for kind_option in (hint, *kinds) if get_origin(kind_option) is tuple)
        return st.lists(_draw_kind(get_args(inner)[0], {"gt": 0}), min_size=1, max_size=4, unique=True)
    return _draw_kind(kinds[0], bounds)


def _draw_kind(kind: Any, bounds: Any) -> st.SearchStrategy[Any]:
    low, high = bounds.get("gt", bounds.get("ge", 0)), bounds.get("lt", 2**53)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(low + ("gt" in bounds), int(high) - ("lt" in bounds))
    if kind is float:
        return st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds, allow_subnormal=False)
    return TEXT


@limit_examples(15)
@given(data=st.data())
def test_a_setting_survives_the_command_line(data: st.DataObject) -> None:
    for name in list_rows(SelectSettings):
        chosen = SelectSettings(**{name: data.draw(draw_values(name))})
        command = build_reproduce_command("./base", "rows.jsonl", chosen)
        assert command is not None
        _, verb, *arguments = shlex.split(command)
        with click.Context(cli) as parent:
            parameters = COMMANDS[verb].make_context(verb, arguments, parent=parent).params
        command_arguments = ("model", "data", "out", "dry_run", "as_json", "quiet")
        options = {option: value for option, value in parameters.items() if option not in command_arguments}
        again = SelectSettings(**gather_settings(options.pop("config_file"), options.pop("assignments"), options))
        assert again == chosen


def test_generated_files_are_up_to_date() -> None:
    for path in GENERATED:
        assert path.read_text(encoding="utf-8") == GENERATED[path](), "run `make generated`"
