"""Draw trainings, write them as a table of any kind, and read the same trainings; a single fault is refused where it is."""

from __future__ import annotations

import csv
import json
from itertools import groupby, product
from operator import itemgetter
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import numpy as np
import pandas
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from rightrank.schema.errors import ResultsError
from rightrank.schema.trials import TrialFinished, TrialOutcome
from rightrank.tables.trainings import FAILURES, MAX_RANK, SUCCESSES, read_result_table
from tests.examples import limit_examples

Row: TypeAlias = dict[str, Any]
Key: TypeAlias = tuple[int, float, int]  # rank, learning rate, seed

TITLES = {
    "rank": ["rank", "LoRA Rank", "r", "config.lora.r", "params.lora_rank", "user_attrs_r", "peft_config.default.r"],
    "value": ["eval_loss", "val/loss", "metrics.eval_loss", "summary.test_loss", "Validation Loss"],
    "lr": ["lr", "learning_rate", "config.learning_rate", "params_lr"],
    "seed": ["seed", "Random Seed", "args.seed"],
    "alpha": ["lora_alpha", "config.peft.alpha"],
    "step": ["step", "Step", "train/global_step", "training_iteration"],
    "example": ["item", "example_id", "Question ID"],
    "group": ["group", "group_id"],
    "weight": ["tokens", "num-tokens", "weight"],
    "std": ["std", "sd", "eval_loss_std"],
    "std_seeds": ["n", "n_seeds"],
    "train_value": ["train_loss", "train/loss", "metrics.training_loss"],
    "status": ["state", "Status"],
    "label": ["run_name", "Created", "id", "tags.mlflow.runName"],
    "model": ["model", "config.base_model"],
    "speed": ["tokens_per_second", "config.batch_size"],
    "logged rate": ["metrics.learning_rate"],
    "accuracy": ["eval_accuracy", "metrics.test/accuracy"],
}  # fmt: skip
CONFIG = {
    "peft_type": "LORA", "base_model_name_or_path": "llama", "lora_dropout": 0.0, "use_dora": False, "use_rslora": False,
    "rank_pattern": {}, "bias": "none", "task_type": "CAUSAL_LM", "revision": None,
}  # fmt: skip
KINDS = ["csv", "semicolons", "tsv", "folder", "jsonl", "json", "rows", "parquet", "frame", "trainer"]


@st.composite
def draw_tables(draw: st.DrawFn, kind: str) -> tuple[list[Row], dict[Key, Row], set[str]]:
    """Draw the rows of trainings by role, what they say of each training, and the notes on what is left out.

    Some trainings have no result, and some rows are repeated or mean nothing.
    """
    roles = {"rank", "value", *draw(st.lists(st.sampled_from(list(TITLES)), unique=True))}
    random = Random(draw(st.integers(0, 10_000)))
    if kind == "trainer":
        roles = roles & {"rank", "value", "lr", "seed", "alpha", "train_value", "model"} | {"step"}
    rates = random.sample([1e-4, 0.00025, 0.003], random.randint(1, 2)) if "lr" in roles else [0.0]
    seeds = random.sample(range(3), random.randint(1, 2)) if "seed" in roles else [0]
    first_rank, *other_ranks = random.sample([1, 2, 8, MAX_RANK], random.randint(1, 3))
    keys = list(product([first_rank, *other_ranks], rates, seeds))
    if kind != "trainer" and random.random() < 0.5:
        keys += [(0, rates[0], seed) for seed in seeds]
    has_examples = "example" in roles
    names = random.sample(["q1", "q2", "q10", "Q3", "q4", "q5"], random.randint(2, 6)) if has_examples else ["all"]
    facts: list[Row] = [
        {"example": name, "weight": random.randint(1, 5), "group": random.choice("ab")} for name in names
    ]
    unscored = names[0] if len(names) > 2 and random.random() < 0.3 else None
    facts[0]["weight"] *= unscored is None
    values = (np.random.default_rng(random.randint(0, 99)).permutation(5000) / 10_000 + 0.1).round(4).tolist()
    alpha_share = random.choice([0, 2])
    rows: list[Row] = []
    trainings: dict[Key, Row] = {}
    for rank, rate, seed in keys:
        fails = rank != first_rank and random.random() < 0.3
        num_steps = 3 if rank == first_rank else random.randint(1, 3)
        steps = sorted(random.sample([9, 10, 30], num_steps)) if "step" in roles else [0]
        training = {
            "rank": rank, "lr": rate, "seed": seed, "alpha": alpha_share * rank or 16, "label": f"run {len(trainings)}",
            "speed": random.random(), "std": random.choice([None, 0, 0.25]), "std_seeds": random.randint(1, 4), "model": "gemma",
            "logged rate": random.random(), "accuracy": random.random(), "status": random.choice(FAILURES if fails and len(steps) == 1 else SUCCESSES),
        }  # fmt: skip
        if rank == 0 and random.random() < 0.5:
            training |= {"alpha": None, "lr": None, "model": None}
        points: list[Any] = []
        for step in steps:
            has_value = not (fails and step == steps[-1])
            training |= {"step": step, "train_value": values.pop()}
            scores = {name: values.pop() if has_value and name != unscored else None for name in names}
            rows += [training | fact | {"value": scores[fact["example"]]} for fact in facts]
            points += [(step, scores[names[0]])] * has_value
            if kind != "trainer" and step > 9 and random.random() < 0.3:  # a row of a log with only the training loss
                rows.append(rows[-1] | {"step": step + random.randint(0, 1), "value": None})
        scored = sorted((fact for fact in facts if fact["example"] != unscored), key=itemgetter("example"))
        groups = [fact["group"] for fact in scored]
        is_grouped = has_examples and "group" in roles and 1 < len(set(groups)) < len(groups)
        weights = [fact["weight"] for fact in scored] if has_examples and "weight" in roles else None
        has_std = "std" in roles and training["std"] is not None
        trainings[rank, rate * (rank > 0), seed] = {"steps": steps[-1]} if fails else {
            "steps": steps[-1],
            "value": pytest.approx(np.average([scores[fact["example"]] for fact in scored], weights=weights)),
            "points": points if "step" in roles and not has_examples else [],
            "example_scores": [scores[fact["example"]] for fact in scored] if has_examples else None,
            "example_weights": weights,
            "example_groups": [groups.index(group) for group in groups] if is_grouped else None,
            "train_value": training["train_value"] if "train_value" in roles else None,
            "seed_deviation": training["std"] if has_std else None,
            "averaged_seeds": training["std_seeds"] if has_std and "std_seeds" in roles else 1,
        }  # fmt: skip
    num_failed = sum(len(described) == 1 for described in trainings.values())
    repeated = [row for row in rows if row["value"] is not None][: random.randint(0, 2) * (kind != "trainer")]
    blank = [rows[0] | {"rank": None, "value": None}] * (random.randint(0, 2) * (kind != "trainer"))
    counts = {"row": len(blank), "repeated row": len(repeated), "training": num_failed, "example": unscored is not None}
    notes = {f"{count:d} {noun}{'s' * (count > 1)}" for noun, count in counts.items() if count}
    return [{role: row[role] for role in TITLES if role in roles} for row in rows + repeated + blank], trainings, notes


def spell_cell(cell: Any, random: Random) -> str:
    if cell is None:
        return random.choice(["", "n/a", "NaN", "—", " "])
    if isinstance(cell, float):
        return random.choice([repr(cell), f" {cell!r}", f"{cell:.15e}"])
    return random.choice([str(cell), f"{cell} ", f"{cell}.0"]) if isinstance(cell, int) else str(cell)


def write_text(path: Path, rows: list[Row], random: Random) -> Path:
    """Write CSV with columns in any order, blank lines and numbers in any notation."""
    delimiter = {"tsv": "\t", "semicolons": ";"}.get(path.stem, ",")
    titles = random.sample(list(rows[0]), len(rows[0]))
    with path.open("w", encoding=random.choice(["utf-8", "utf-8-sig"]), newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(titles)
        for row in rows:
            writer.writerows([[]] * random.randint(0, 1))
            writer.writerow([spell_cell(row[title], random) for title in titles])
    return path


def nest_row(row: Row, random: Random) -> Row:
    """Write some of the names with dots as nested objects, and leave out some of the empty cells."""
    nested: Row = {}
    for title, cell in row.items():
        *outer, last = title.split(".") if random.random() < 0.5 else [title]
        objects = nested
        for name in outer:
            objects = objects.setdefault(name, {})
        objects |= {last: cell} if cell is not None or random.random() < 0.5 else {}
    return nested


def write_trainer_outputs(root: Path, rows: list[Row], random: Random) -> Path:
    """Write the checkpoints of each training as transformers' Trainer does, each with the log up to its step."""
    for number, (_, training) in enumerate(
        groupby(rows, key=lambda row: (row["rank"], row.get("lr"), row.get("seed")))
    ):
        history: list[Row] = []
        for row in training:
            loss = {"loss": row["train_value"]} if "train_value" in row else {}
            rates = [row["lr"], row["lr"] / 2] if "lr" in row else []
            history += [{"step": row["step"] - 1, "learning_rate": rate, "loss": 9.0} for rate in rates] * bool(loss)
            history += [{"step": row["step"], "learning_rate": rate} | loss for rate in rates] or [
                {"step": row["step"]} | loss
            ]
            history.append({"step": row["step"], "eval_loss": row["value"], "eval_runtime": random.random()})
            name = f"seed{row['seed']}/{number}" if "seed" in row else str(number)
            folder = root / name / f"checkpoint-{row['step']}"
            folder.mkdir(parents=True)
            config = CONFIG | {
                "r": row["rank"],
                "lora_alpha": row.get("alpha", 16),
                "target_modules": random.sample("ab", 2),
            }
            (folder / "adapter_config.json").write_text(json.dumps(config))
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": row["step"], "log_history": history}))
    return root


def write_table(kind: str, rows: list[Row], folder: Path, random: Random) -> Any:
    if kind == "trainer":
        return write_trainer_outputs(folder, rows, random)
    titles = {role: random.choice(TITLES[role]) for role in rows[0]}
    titles |= {"value": "eval_loss"} if titles.get("std") == "eval_loss_std" else {}
    table = [{titles[role]: cell for role, cell in row.items()} for row in random.sample(rows, len(rows))]
    if kind in ("csv", "tsv", "semicolons"):
        return write_text(folder / f"{kind}.{'tsv' if kind == 'tsv' else 'csv'}", table, random)
    if kind == "folder":
        middle = random.randint(1, len(table))
        for number, rows_of_file in enumerate(filter(None, (table[:middle], table[middle:]))):
            write_text(folder / f"{number}.csv", rows_of_file, random)
        return folder
    if kind in ("parquet", "frame"):
        frame = pandas.DataFrame(table)
        if kind == "frame":
            index = random.choice([[], ["rank"], ["rank", "value"]])
            return frame.set_index([*(titles[role] for role in index), pandas.RangeIndex(len(frame))])  # type: ignore[arg-type]
        frame.to_parquet(folder / "runs.parquet")
        return folder / "runs.parquet"
    nested, path = [nest_row(row, random) for row in table], folder / f"runs.{kind}"
    if kind != "rows":
        path.write_text(json.dumps(nested) if kind == "json" else "\n\n".join(map(json.dumps, nested)))
    return nested if kind == "rows" else path


def describe(outcome: TrialOutcome) -> Row:
    """Return what a table says of a training; groups are numbered as they occur."""
    if not isinstance(outcome, TrialFinished):
        return {"steps": outcome.steps}
    groups = outcome.example_groups
    names = ("steps", "value", "example_scores", "example_weights", "train_value", "seed_deviation", "averaged_seeds")
    return {name: getattr(outcome, name) for name in names} | {
        "points": [(point.step, point.value) for point in outcome.points],
        "example_groups": groups and [groups.index(group) for group in groups],
    }


@pytest.mark.parametrize("kind", KINDS)
@limit_examples(30, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.integers(0, 10_000))
def test_trainings_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject, seed: int
) -> None:
    rows, trainings, notes = data.draw(draw_tables(kind))
    table = read_result_table(write_table(kind, rows, tmp_path_factory.mktemp("table"), Random(seed)))
    read = {(outcome.rank, outcome.learning_rate, outcome.seed): describe(outcome) for outcome in table.outcomes}
    assert read == trainings
    assert list(read) == sorted(trainings)
    assert not table.higher_is_better
    assert not any("accuracy" in note for note in table.notes)  # another metric may differ
    assert {note.partition(" with")[0].partition(" omitted")[0] for note in table.notes if note[0].isdecimal()} == notes


TABLE: list[Row] = [
    {
        "rank": rank, "lr": rate, "seed": seed, "lora_alpha": 2 * rank, "step": 100, "item": item, "group": item < "c", "tokens": 3,
        "state": "finished", "model": "gemma", "std": 0.1, "n": 2, "train_loss": 1.5, "eval_loss": 2 + 1 / rank + seed / 90 + rate,
    }
    for rank, rate, seed, item in product((4, 16), (1e-4, 3e-4), (0, 1), "abc")
]  # fmt: skip
WHOLE, POSITIVE, NUMBERS = ["rank", "seed", "step", "n"], ["lr", "tokens", "std"], ["eval_loss", "train_loss"]
TOO_LARGE = {"rank": MAX_RANK + 1, "seed": 2**54, "step": 2**54, "n": 2**54} | dict.fromkeys(POSITIVE + NUMBERS, 1.1e60)
ROLES = {"lr": "learning rate", "tokens": "weight", "n": "std_seeds", "train_loss": "train_value"}
BAD_NUMBERS = [
    *((name, cell) for name in TOO_LARGE for cell in ("x", "1,5", "1_0", "5%", TOO_LARGE[name])),
    *((name, cell) for name in WHOLE + POSITIVE for cell in (-1, "inf")),
    *((name, cell) for name in WHOLE for cell in (1.5, "1e1", "1.000")),
    *(("n", 0), ("rank", None), ("rank", "nan"), ("eval_loss", -1.1e60)),
]


@pytest.mark.parametrize(
    ("name", "cell", "message"),
    [
        *((name, cell, f"row {{row}}: {ROLES.get(name, name)} {cell!r} is not allowed: give a") for name, cell in BAD_NUMBERS),
        *(("tokens", cell, "row {row}: tokens is not above 0") for cell in (0, None)),
        ("tokens", 2, "example {item} has another tokens"),
        ("group", "z", "example {item} has another group"),
        *(("item", cell, f"row {{row}}: the example {cell!r} in column item is no name") for cell in (None, "", "n/a", "Null", "-")),
        ("item", "d", "has scores of 3 of the 4 examples of other trainings"),
        ("eval_loss", None, "rank {rank}, lr {lr}, seed {seed} has scores of 2 of the 3 examples of other trainings ({item} is missing)"),
        ("state", "running", "row {row}: state 'running' is not a known success"),
        ("state", "failed", "row {row}: state 'failed' is not a known success"),
        ("model", "llama", "the trainings differ in model ('gemma', 'llama')"),
        ("lora_alpha", 7, "the trainings differ in lora_alpha"),
    ],
)  # fmt: skip
@limit_examples(3)
@given(number=st.integers(0, len(TABLE) - 1))
def test_a_single_cell_that_is_wrong_is_refused_by_name(name: str, cell: Any, message: str, number: int) -> None:
    rows = [dict(row) for row in TABLE]
    rows[number][name] = cell
    with pytest.raises(ResultsError) as refused:
        read_result_table(pandas.DataFrame(rows, dtype=object) if number % 2 else rows)
    assert message.format(row=number + 1, **TABLE[number]) in str(refused.value)
    assert "\n" not in str(refused.value)


def write_three_trainings(root: Path) -> Path:
    """Write the outputs of Trainer for the ranks 1, 4 and 16."""
    return write_trainer_outputs(
        root, [{"rank": rank, "step": 50, "value": 2 + 1 / rank} for rank in (1, 4, 16)], Random(0)
    )


@pytest.mark.parametrize(
    "difference",
    [
        {"base_model_name_or_path": "gemma"}, {"lora_alpha": 256}, {"lora_dropout": 0.1}, {"use_dora": True},
        {"use_rslora": True}, {"rank_pattern": {"q_proj": 4}}, {"target_modules": ["q_proj"]}, {"bias": "all"},
        {"init_lora_weights": "gaussian"}, {"peft_type": "ADALORA"}, {"revision": "main"},
    ],
    ids=lambda difference: next(iter(difference)),
)  # fmt: skip
def test_adapters_are_compared_by_their_whole_configuration(tmp_path: Path, difference: Row) -> None:
    (path,) = write_three_trainings(tmp_path).glob("2/*/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | difference))
    (name,) = difference
    with pytest.raises(ResultsError, match=f"the trainings differ in {name}.*--ignore {name}"):
        read_result_table(tmp_path)
    assert [outcome.rank for outcome in read_result_table(tmp_path, ignore=[name]).outcomes] == [1, 4, 16]


def test_outputs_of_trainer_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    (write_three_trainings(tmp_path / "seeds") / "0").rename(tmp_path / "seeds" / "seed0-seed1")
    with pytest.raises(ResultsError, match="states the seeds 0, 1"):
        read_result_table(tmp_path / "seeds")
    next(write_three_trainings(tmp_path / "none").rglob("adapter_config.json")).unlink()
    with pytest.raises(ResultsError, match=r"there is no adapter_config\.json in its folder"):
        read_result_table(tmp_path / "none")
    for path in write_three_trainings(tmp_path / "empty").rglob("trainer_state.json"):
        path.write_text('{"log_history": []}')
    with pytest.raises(ResultsError, match="contain no evaluation"):
        read_result_table(tmp_path / "empty")


@pytest.mark.parametrize("groups", [["g"] * 3, ["g", "h", "i"]])
def test_a_column_that_groups_nothing_is_refused_only_if_it_was_named(groups: list[str]) -> None:
    rows = [row | {"group": groups["abc".index(row["item"])]} for row in TABLE]
    assert len(read_result_table(rows).outcomes) == 8
    with pytest.raises(ResultsError, match="column group does not divide the examples into groups"):
        read_result_table(rows, columns={"group": "group"})
