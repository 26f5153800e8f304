"""Test the reader of result tables through `decide`: what is read, what must be declared, and what is refused with file and row."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from rightrank import decide, plots
from rightrank.cli import cli
from rightrank.schema.errors import ResultsError, SettingsError
from rightrank.tables.trainings import FAILURES, SUCCESSES
from tests.commands import run
from tests.examples import limit_examples

GOOD = "rank,eval_loss\n1,2.3\n4,2.05\n16,2.001\n64,2.0\n"
LOSSES = {4: 2.05, 16: 2.001, 64: 2.0}
ROWS: list[dict[str, Any]] = [{"rank": rank, "eval_loss": loss} for rank, loss in LOSSES.items()]


def write_table(folder: Path, text: str, name: str = "runs.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def decide_values(table: Any, **options: Any) -> dict[int, float]:
    return {evidence.rank: evidence.value for evidence in decide(table, **options).decision.ranks}


def add_column(name: str, cells: Sequence[Any], rows: Sequence[dict[str, Any]] = ROWS) -> list[dict[str, Any]]:
    return [row | {name: cell} for row, cell in zip(rows, cells, strict=True)]


# what is read


def test_learning_rates_that_differ_in_their_last_bits_are_one() -> None:
    """As spreadsheets write them. With two rates, the best one would be at an edge of those that were tried."""
    rows = [
        {"rank": rank, "lr": rate, "seed": seed, "eval_loss": 1 + 1 / rank + 0.001 * seed}
        for rank in (1, 4, 16)
        for seed, rate in enumerate((0.001, 0.0010000000000000002))
    ]
    answer = decide(rows).decision
    assert {evidence.learning_rate for evidence in answer.ranks} == {0.001}
    assert {evidence.seeds for evidence in answer.ranks} == {2}
    assert "lr_edge" not in answer.flags


@pytest.mark.parametrize("results", [5, None, pandas.Series([1.0, 2.0])])
def test_what_is_no_table_is_refused_in_one_line(results: Any) -> None:
    with pytest.raises(
        ResultsError, match=r"results: got \w+; give a file, a run folder, a data frame, or a list of mapp"
    ):
        decide(results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": "bets"}, r"checkpoint: got 'bets'; give 'last' or 'best'$"),
        ({"higher_is_better": "false"}, r"higher_is_better: got 'false'; give True or False$"),
        ({"higher_is_better": ""}, r"higher_is_better: got ''; give True or False$"),
        ({"ignore": "seed"}, r"ignore: got 'seed'; give a list of columns$"),
        ({"confidence": "0.6"}, r"confidence: got '0\.6'; give a probability"),
        ({"columns": ["rank"]}, r"columns: got .*; give a mapping of names to columns"),
        ({"metric": ["loss"]}, r"metric: got .*; give a name, such as 'loss'$"),
        ({"where": "task"}, r"where: got 'task'; give a mapping of columns to values"),
    ],
)
def test_decide_refuses_arguments_of_another_type(arguments: dict[str, Any], message: str) -> None:
    rows = [{"rank": rank, "loss": 1 + 1 / rank, "seed": seed} for rank in (1, 4) for seed in (0, 1)]
    with pytest.raises(SettingsError, match=message):
        decide(rows, **arguments)


def test_columns_and_metrics_are_named_by_hand(tmp_path: Path) -> None:
    path = write_table(tmp_path, GOOD.replace("rank,eval_loss", "groesse,guete"))
    mapping = {"rank": "groesse", "value": "guete"}
    assert decide(path, columns=mapping, margin=0.005, higher_is_better=False).decision.rank == 16
    with pytest.raises(ResultsError, match="is recognized as the rank; name it with --columns rank=COLUMN"):
        decide(path, columns={"value": "guete"})
    for options in ({"columns": {"rank": "x"}}, {"ignore": ["x"]}, {"where": {"x": 1}}):
        with pytest.raises(ResultsError, match="has no column 'x'"):
            decide(path, **options)
    rows = [{"rank": rank, "eval/accuracy": 0.9 + rank / 1000, "eval/loss": 1.0} for rank in LOSSES]
    by_accuracy = decide(rows, metric="accuracy").decision
    assert (by_accuracy.metric, by_accuracy.higher_is_better, by_accuracy.reference_rank) == ("accuracy", True, 64)


@given(st.lists(st.sampled_from(["wer", "eval/rougeL", "FID", "train/wer"]), min_size=1, unique=True))
def test_a_metric_is_the_held_out_value_if_it_is_the_only_one(names: list[str]) -> None:
    rows = [{"rank": rank} | dict.fromkeys(names, loss) for rank, loss in LOSSES.items()]
    metrics = [name for name in names if name != "train/wer"]
    if len(metrics) == 1:
        assert decide(rows, margin=0.01).decision.metric == metrics[0]
    else:
        with pytest.raises(ResultsError, match="no column is recognized as the held-out value"):
            decide(rows, margin=0.01)


@given(
    st.sampled_from(["", "metrics.", "summary/", "metrics/"]),
    st.sampled_from(["eval_", "eval/", "test-", "Validation "]),
    st.sampled_from([("accuracy", True), ("acc", True), ("f1", True), ("perplexity", False), ("nll", False)]),
    st.sampled_from(["", " (%)"]),
)
def test_neither_prefix_nor_split_nor_unit_changes_the_direction_of_a_metric(
    prefix: str, split: str, metric: Any, unit: str
) -> None:
    name, higher_is_better = metric
    decided = decide([{"rank": rank, f"{prefix}{split}{name}{unit}": loss} for rank, loss in LOSSES.items()]).decision
    assert decided.higher_is_better == higher_is_better
    assert decided.reference_rank == (4 if higher_is_better else 64)


@pytest.mark.filterwarnings("ignore")  # warnings of MLflow
def test_the_runs_of_mlflow_are_a_data_frame(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    address = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = mlflow.MlflowClient(address)
    experiment = client.create_experiment("lora")
    for rank, loss in LOSSES.items():
        run = client.create_run(experiment).info.run_id
        client.log_param(run, "lora_r", rank)
        client.log_metric(run, "eval_loss", loss)
        client.set_terminated(run)
    previous_uri = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(address)
    try:
        assert decide_values(mlflow.search_runs([experiment])) == LOSSES
    finally:
        mlflow.set_tracking_uri(previous_uri)


def test_a_file_and_its_decision_are_plotted_and_become_a_data_frame(tmp_path: Path) -> None:
    path = write_table(tmp_path, GOOD)
    decided = decide(path)
    assert list(decided.decision.to_pandas().index) == [1, 4, 16, 64]
    for source in (path, str(path), decided, decided.decision):
        assert plots.rank_curve(source).get_xlabel()


@pytest.mark.trains
def test_text_is_read_without_pandas_and_torch(tmp_path: Path) -> None:
    path = write_table(tmp_path, GOOD)
    program = (
        "import sys; from rightrank import decide; decide(sys.argv[1]); print({'torch', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# what must be declared

NAMES = st.text(alphabet=st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=20)
UNUSED_NAMES = NAMES.map(lambda name: f"{name}_of_the_training".strip()).filter(lambda name: not name.startswith("-"))


@given(UNUSED_NAMES, st.sampled_from(["ab", [True, False], [None, "4bit"], [["q_proj"], ["q_proj", "v_proj"]]]))
@limit_examples(50)
def test_a_difference_that_is_not_a_number_must_be_declared(name: str, cells: Sequence[Any]) -> None:
    rows = add_column(name, [cells[0], cells[1], cells[1]])
    with pytest.raises(ResultsError) as caught:
        decide(rows)
    assert "the trainings differ in" in str(caught.value)
    assert f"--ignore {name}" in str(caught.value)
    assert decide(rows, ignore=[name]).decision == decide(ROWS).decision


CELLS = st.recursive(
    st.booleans() | st.dates() | st.builds(Path, NAMES) | st.builds(np.float32, st.integers(0, 9)),
    st.lists,
    max_leaves=4,
)


@given(st.lists(CELLS, min_size=1, max_size=3), st.lists(CELLS, min_size=1, max_size=3))
@limit_examples(50)
def test_cells_of_any_type_are_compared(first: Any, second: Any) -> None:
    """Lists of settings may hold objects of other libraries."""
    assert decide(add_column("targets", [first] * 3)).decision == decide(ROWS).decision
    mappings = [[{"a": 1, "b": first}], [{"b": first, "a": 1}]]  # the order of names means nothing
    assert decide(add_column("targets", [*mappings, mappings[0]])).decision == decide(ROWS).decision
    if json.dumps(first, default=str) != json.dumps(second, default=str):
        with pytest.raises(ResultsError, match="the trainings differ in targets"):
            decide(add_column("targets", [first, second, second]))


def test_the_command_has_both_declarations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_table(tmp_path, "rank,model,eval_loss\n4,gemma,2.05\n8,gemma,2.04\n32,llama,1.5\n64,llama,1.49\n")
    refused = CliRunner().invoke(cli, ["decide", str(path)])
    assert "differ in model ('gemma', 'llama'), so they cannot be compared" in str(refused.exception)
    some = CliRunner().invoke(cli, ["decide", str(path), "--where", "model=llama", "--json"])
    status, *_ = run(["decide", str(path), "--ignore", "model", "--report", str(tmp_path / "page.html")], capsys)
    assert [row["rank"] for row in json.loads(some.stdout)["ranks"]] == [32, 64]
    assert status == 0
    assert f"rightrank decide {path} --ignore model" in (tmp_path / "page.html").read_text(encoding="utf-8")
    for arguments in (["--where", "model"], ["--where", "model=x"], ["--ignore", "x"], ["--where", "x=1"]):
        assert CliRunner().invoke(cli, ["decide", str(path), *arguments]).exit_code != 0


def test_numbers_that_differ_are_named() -> None:
    rows = add_column("batch_size", [8, 8, 16], add_column("max_length", [512] * 3))
    assert "different between the trainings, and not taken into account: batch_size" in decide(rows).input_notes
    rows = add_column("config.accuracy", [0.1, 0.2, 0.3], rows)  # a threshold, for example
    assert any(note.endswith(": batch_size, config.accuracy") for note in decide(rows).input_notes)
    assert [evidence.rank for evidence in decide(rows, where={"batch_size": 8.0}).decision.ranks] == [4, 16]


@given(st.lists(st.sampled_from("abc"), min_size=6, max_size=6), st.integers(0, 17), st.sampled_from("abcd"))
@limit_examples(50)
def test_a_text_may_depend_on_the_example_and_the_step_but_not_on_the_training(
    texts: list[str], changed: int, other: str
) -> None:
    """A training without a result, and the base, are not compared."""
    rows = [
        {
            "rank": rank,
            "step": step,
            "item": f"e{item}",
            "eval_loss": 2 + item / 10 + 1 / rank,
            "subject": texts[3 * number + item],
        }
        for rank in LOSSES
        for number, step in enumerate((10, 20))
        for item in range(3)
    ]
    failed = {"rank": 128, "step": 20, "item": "e0", "eval_loss": None, "subject": "another"}
    plain = [{name: cell for name, cell in row.items() if name != "subject"} for row in rows]
    assert decide([*rows, failed]).decision.ranks == decide(plain).decision.ranks
    if rows[changed]["subject"] != other:
        rows[changed] |= {"subject": other}
        with pytest.raises(ResultsError, match="differ in subject"):
            decide(rows)


@given(st.lists(st.just(0) | st.integers(2, 100), min_size=3, max_size=3, unique=True))
def test_accuracies_are_fractions_or_percentages(values: list[int]) -> None:
    percentages = [{"rank": rank, "accuracy": value} for rank, value in zip(LOSSES, values, strict=True)]
    by_value = [
        decide([row | {"accuracy": row["accuracy"] / unit} for row in percentages], margin=0.02 / unit)
        for unit in (1, 100)
    ]
    assert by_value[0].decision.rank == by_value[1].decision.rank
    with pytest.raises(ResultsError, match="write all as fractions from 0 to 1, or all as percentages"):
        decide([*percentages, {"rank": 2, "accuracy": 0.5}, {"rank": 8, "accuracy": 100.5}])


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        ([16, 16, 16], ""),
        ([16, 16.000000000000004, 16], ""),
        ([8, 32, 128], "lora_alpha is 2 times the rank"),
        ([8, 16, 32], None),
        ([8, None, 8], None),
    ],
)
def test_alpha_is_equal_or_proportional_to_the_rank(alphas: list[Any], message: str | None) -> None:
    rows = add_column("lora_alpha", alphas)
    for base_alpha in (None, 16):  # the base has no alpha, whatever its row says
        with_base = [*rows, {"rank": 0, "eval_loss": 3.0, "lora_alpha": base_alpha}]
        if message is None:
            with pytest.raises(ResultsError, match="neither equal nor proportional to the rank"):
                decide(with_base)
            assert decide(with_base, ignore=["lora_alpha"])
        else:
            assert [note for note in decide(with_base).input_notes if "alpha" in note] == [message] * bool(message)


STATES = st.sampled_from(["TIMEOUT", "CANCELLED", "preempted", "NODE_FAIL", "running", "PRUNED", "", *FAILURES]) | NAMES


@given(STATES.filter(lambda state: state.lower() not in SUCCESSES))
@limit_examples(50)
def test_a_state_that_is_not_a_known_success_is_refused(state: str) -> None:
    states = ["finished", "COMPLETE", state]
    with pytest.raises(ResultsError, match=r"row 3: state .* is not a known success"):
        decide(add_column("state", states))
    assert decide(add_column("state", states), ignore=["state"]).decision == decide(ROWS).decision
    without_value = [*add_column("state", ["Succeeded"] * 3), {"rank": 128, "eval_loss": math.nan, "state": state}]
    if state.lower() in FAILURES:
        assert "1 training without a result" in decide(without_value).input_notes
    else:
        with pytest.raises(ResultsError, match="is not a known success"):
            decide(without_value)


# what is refused


@pytest.mark.parametrize("name", ["rank", "eval_loss", "note"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "frame", "index", "nested"])
def test_two_columns_with_one_name_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    header = ["rank", "eval_loss", "note", name]
    cells: list[list[float]] = [[4, 2.0, 1, 5], [16, 1.9, 1, 6], [64, 1.8, 1, 7]]
    objects = ["{" + ", ".join(f'"{n}": {cell}' for n, cell in zip(header, row, strict=True)) + "}" for row in cells]
    source: Any = tmp_path / f"runs.{kind}"
    if kind == "csv":
        source.write_text("\n".join([",".join(header), *(",".join(map(str, row)) for row in cells)]))
    elif kind in ("json", "jsonl"):
        source.write_text("\n".join(objects) if kind == "jsonl" else f"[{', '.join(objects)}]")
    elif kind == "frame":
        source = pandas.DataFrame(cells, columns=header)
    elif kind == "index":
        source = pandas.DataFrame(cells, columns=[*header[:3], "speed"]).set_index(name, drop=False)
    else:
        source = [{"rank": 4, "eval_loss": 2.0, "a.b": 1, "a": {"b": 2}}]
        name = "a.b"
    with pytest.raises(ResultsError, match=f"two columns are named '{name}'"):
        decide(source)


@pytest.mark.parametrize("other", ["Rank", "lora_r", "config.rank"])
def test_two_columns_that_may_be_the_rank_are_refused(other: str) -> None:
    rows = add_column(other, [16, 4, 64])
    with pytest.raises(ResultsError, match="may mean the same; name the one to use with --columns rank=COLUMN"):
        decide(rows)
    assert decide_values(rows, columns={"rank": "rank"}) == LOSSES
    equal_rows = add_column(other, list(LOSSES))
    assert decide_values(equal_rows) == LOSSES
    assert decide(equal_rows).input_notes == decide([dict(reversed(row.items())) for row in equal_rows]).input_notes


@pytest.mark.parametrize("loss", ["metrics.loss", "loss"])
@pytest.mark.parametrize("other_column", ["train_loss", "train/loss", "train_runtime", "grad_norm"])
def test_a_loss_beside_the_columns_of_a_training_log_is_refused(loss: str, other_column: str) -> None:
    rows = [{"rank": rank, loss: 1.0 / rank, other_column: 2.0 / rank} for rank in LOSSES]
    with pytest.raises(ResultsError, match=f"{loss} may be the training loss.*--metric {loss}"):
        decide(rows)
    assert decide(rows, metric=loss, margin=0.01).decision.reference_rank == 64
    assert decide([row | {"eval_loss": 1 + row["rank"]} for row in rows]).decision.metric == "eval_loss"


@pytest.mark.parametrize("name", ["value", "brier_gap", "toxicity_score", "accuracy_drop"])
def test_a_metric_without_a_known_direction_is_refused(name: str) -> None:
    rows = [{"rank": rank, name: loss} for rank, loss in LOSSES.items()]
    with pytest.raises(ResultsError, match="give --higher-is-better or --lower-is-better"):
        decide(rows, metric=name)
    with pytest.raises(ResultsError, match="add rank 0, or give a margin in the metric"):
        decide(rows, metric=name, higher_is_better=False)
    assert decide(rows, metric=name, higher_is_better=False, margin=0.01).decision.reference_rank == 64
    assert decide(rows, metric=name, higher_is_better=True, margin=0.01).decision.rank == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows; give a header and one row"),
        ("rank,eval_loss\n", "no rows; give a header and one row"),
        ("size,eval_loss\n1,2\n2,3\n", "none of the columns (eval_loss, size) is recognized as the rank"),
        ("rank,other\n1,2\n2,3\n", "is recognized as the held-out value"),
        ("rank,train_loss\n1,2\n2,3\n", "no column is recognized as the held-out value"),
        ("rank,eval_loss\n1.5,2\n2,3\n", "runs.csv:2: rank '1.5' is not allowed"),
        ("rank,eval_loss\n-1,2\n2,3\n", "runs.csv:2: rank '-1' is not allowed"),
        ("rank,eval_loss\n,2\n2,3\n", "runs.csv:2: rank '' is not allowed: give a whole number up to 1,048,576; 0 is the base"),
        ("rank,eval_loss\n0,3\n4,\n", "no row has both a rank and a held-out value"),
        ("rank,eval_loss\n0,3\n4,2\n", "one rank has a finished trial"),
        ('rank,eval_loss\n1,"2,1"\n2,"2,0"\n', "runs.csv:2: eval_loss '2,1' is not allowed: give a number"),
        ("rank;lr;eval_loss\n1;0.01;2,001\n2;0.01;2,002\n", "write numbers with a decimal point"),
        ("rank,eval_loss\n1,2\n2,-1e61\n", "runs.csv:3: eval_loss '-1e61' is not allowed: give a number from -1e+60"),
        ("rank,eval_loss\n1,2\n2,1_000\n", "runs.csv:3: eval_loss '1_000' is not allowed"),
        ("rank,eval_loss\n1,2\n2,OOM\n", "or leave the cell empty where a training has no result"),
        ("rank,eval_loss\n1,True\n2,False\n", "write numbers with a decimal point"),
        ("rank,eval_loss\n1,85%\n2,86%\n", "write numbers with a decimal point"),
        ("rank,std,eval_loss\n1,-0.1,2\n2,0.1,3\n", "runs.csv:2: std '-0.1' is not allowed"),
        ("rank,lr,eval_loss\n1,-1,2\n2,1e-3,3\n", "runs.csv:2: learning rate '-1' is not allowed"),
        ("rank,lr,eval_loss\n1,0,2\n2,1e-3,3\n", "runs.csv: r=1 lr=0 seed=0 has no learning rate, but other trainings have one"),
        ("rank,lr,eval_loss\n1,1e-3,2\n2,,3\n", "runs.csv: r=2 lr=0 seed=0 has no learning rate, but other trainings have one"),
        ("rank,seed,eval_loss\n1,x,2\n2,0,3\n", "runs.csv:2: seed 'x' is not allowed"),
        ("rank,item,tokens,eval_loss\n1,a,,2\n2,a,3,3\n", "runs.csv:2: tokens is not above 0"),
        ("rank,item,tokens,eval_loss\n1,a,3,2\n1,b,1,2\n2,a,4,3\n2,b,1,3\n", "runs.csv:4: example a has another tokens"),
        ("rank,item,group,eval_loss\n1,a,3,2\n1,b,1,2\n2,a,4,3\n2,b,1,3\n", "runs.csv:4: example a has another group"),
        ("rank,eval_loss\n1,2\n2,2\n4,2\n", "every training has the value 2"),
        ("rank,warmup,eval_loss\n1,5,2\n2,5,3\n2,6,4\n", "runs.csv:4: rank 2, seed 0 occurs twice with different values (also in runs.csv:3"),
        ("rank,perplexity\n1,-3\n2,3\n", "perplexity of -3 is not possible"),
        ("rank,accuracy\n1,0.81\n4,86\n", "accuracy is 0.81 in one training and 86 in another; write all as fractions"),
        ("rank,eval_loss\n1,2,3\n2,3\n", "runs.csv:2: 3 cells, but the header has 2 columns"),
        ('rank,note,eval_loss\n1,"a\r\nb\nc",2\n\n2,d,x\n', "runs.csv:6: eval_loss 'x' is not allowed"),
        ("rank,eval_loss\n1\n2,3\n", "runs.csv:2: 1 cells, but the header has 2 columns"),
    ],
)  # fmt: skip
def test_bad_tables_are_refused_with_file_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path, text)
    with pytest.raises(ResultsError) as caught:
        decide("runs.csv")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "no such file"),
        (".", None, "contains no results in a known format"),
        ("latin.csv", "rank,größe\n1,2\n".encode("latin-1"), "not UTF-8"),
        ("study.db", b"SQLite format 3\x00", r"files of type '\.db' are not supported; give a file ending in"),
        ("runs.parquet", b"PAR1", "not a table that pandas can read"),
        ("runs.json", b"[1, 2]", "runs.json: entry 1: got int"),
        ("runs.jsonl", b'{"rank": 1', r"runs.jsonl:1: not a row in JSON"),
    ],
)
def test_a_path_without_a_table_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ResultsError, match=message):
        decide(tmp_path / name)
