"""Test tables of results and files of other tools: what is recognized, and what is refused with file and row."""

from __future__ import annotations

import json
import math
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pytest

from rightrank.api.runs import decide
from rightrank.report.answer import build_evidence_table
from rightrank.schema.errors import ResultsError

GOOD = "rank,value\n1,2.3\n4,2.05\n16,2.001\n64,2.0\n"


def write_table(folder: Path, text: str, name: str = "runs.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "peft_config.default.r,Eval Loss\n1,2.3\n4,2.05\n16,2.001\n64,2.0\n",
        "lora_r,eval_loss,train_loss\n1,2.3,1\n4,2.05,1\n16,2.001,1\n64,2.0,1\n",
        "Name,State,config.lora.r,eval/loss\na,finished,1,2.3\nb,finished,4,2.05\nc,finished,16,2.001\nd,finished,64,2.0\n",
        "run_id,params.lora_rank,metrics.eval_loss\na,1,2.3\nb,4,2.05\nc,16,2.001\nd,64,2.0\n",
        'run_id,peft_params,eval_loss\n1,"{""r"": 1}",2.3\n2,"{""r"": 4}",2.05\n3,"{""r"": 16}",2.001\n4,"{""r"": 64}",2.0\n',
    ],
    ids=["plain", "words", "peft", "wandb", "mlflow", "json cell"],
)
def test_similar_column_names_are_recognized(tmp_path: Path, text: str) -> None:
    decided = decide(write_table(tmp_path, text), margin=0.005, higher_is_better=False)
    assert decided.decision.rank == 16
    assert decided.decision.higher_is_better is False


def test_jsonl_and_rows_in_memory_agree(tmp_path: Path) -> None:
    rows = [{"rank": rank, "value": value} for rank, value in ((1, 2.3), (4, 2.05), (16, 2.001), (64, 2.0))]
    path = write_table(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "runs.jsonl")
    assert (
        decide(path, margin=0.005, higher_is_better=False).decision.rank
        == decide(rows, margin=0.005, higher_is_better=False).decision.rank
        == 16
    )


def test_a_wandb_export_in_json_is_flattened(tmp_path: Path) -> None:
    runs = [
        {"name": f"run-{rank}", "config": {"lora": {"r": rank}, "learning_rate": 1e-4}, "summary": {"eval/loss": loss}}
        for rank, loss in ((1, 2.3), (4, 2.001), (16, 2.0))
    ]
    decided = decide(write_table(tmp_path, json.dumps(runs), "wandb.json"), margin=0.005)
    assert decided.decision.rank == 4
    assert decided.decision.learning_rate == 1e-4


def test_the_direction_follows_the_metric_unless_given(tmp_path: Path) -> None:
    path = write_table(tmp_path, "rank,accuracy\n1,0.5\n4,0.7\n16,0.701\n")
    assert decide(path).decision.rank == 4
    assert decide(path, higher_is_better=False).decision.reference_rank == 1


def test_the_metric_is_never_a_training_metric(tmp_path: Path) -> None:
    decided = decide(write_table(tmp_path, "rank,BLEU,train_bleu\n1,60,1\n4,69.5,2\n16,70,3\n"))
    assert (decided.decision.metric, decided.decision.rank) == ("BLEU", 4)


@pytest.mark.parametrize("loss", ["metrics.loss", "metrics/loss", "summary.loss", "loss"])
@pytest.mark.parametrize(
    "other_column", ["train_loss", "metrics.train_loss", "train/loss", "train_runtime", "grad_norm"]
)
def test_an_ambiguous_loss_column_is_refused(loss: str, other_column: str) -> None:
    rows = [{"rank": rank, loss: 1.0 / rank, other_column: 2.0 / rank} for rank in (1, 4, 16)]
    with pytest.raises(ResultsError, match=f"{loss} may be the training loss.*--metric {loss}"):
        decide(rows)
    assert decide(rows, metric=loss, margin=0.01).decision.reference_rank == 16
    held_out = [{**row, "eval_loss": 1.0 + 0.1 * row["rank"]} for row in rows]
    decided = decide(held_out, margin=0.01).decision
    assert (decided.metric, decided.reference_rank, decided.flags) == ("eval_loss", 1, ["underpowered", "one_seed"])


def test_a_column_is_named_by_hand(tmp_path: Path) -> None:
    path = write_table(tmp_path, "groesse,guete\n1,2.3\n4,2.001\n16,2.0\n")
    assert (
        decide(path, columns={"rank": "groesse", "value": "guete"}, margin=0.005, higher_is_better=False).decision.rank
        == 4
    )
    with pytest.raises(ResultsError, match="is recognized as the rank"):
        decide(path, higher_is_better=False)
    with pytest.raises(ResultsError, match="has no column 'x'"):
        decide(path, columns={"rank": "x"}, higher_is_better=False)


def test_examples_seeds_and_tokens_are_paired_and_weighted(tmp_path: Path) -> None:
    lines = ["rank,seed,item,tokens,value"]
    for rank, shift in ((1, 0.2), (4, 0.0)):
        for seed in (0, 1):
            for example in range(20):
                lines.append(f"{rank},{seed},{example},{1 + example % 3},{2 + 0.1 * example + shift + 0.001 * seed}")
    decision = decide(write_table(tmp_path, "\n".join(lines) + "\n"), margin=0.01, higher_is_better=False).decision
    assert decision.basis == "examples and seeds"
    evidence = decision.ranks[0]
    assert evidence.difference == pytest.approx(0.2)
    tokens = [1 + example % 3 for example in range(20)]
    mean = sum((2 + 0.1 * example) * count for example, count in enumerate(tokens)) / sum(tokens)
    assert decision.ranks[1].value == pytest.approx(mean + 0.0005)


def test_the_last_evaluation_of_a_training_counts(tmp_path: Path) -> None:
    text = "rank,step,eval_loss\n" + "".join(
        f"{rank},{step},{3 - step / 100 - rank / 1000}\n" for rank in (1, 4) for step in (25, 50, 75, 100)
    )
    decision = decide(write_table(tmp_path, text), margin=0.005).decision
    assert decision.ranks[0].value == pytest.approx(2 - 0.001)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("rank,value\n", "a header and no rows"),
        ("size,value\n1,2\n2,3\n", "none of the columns (size, value) is recognized as the rank"),
        ("rank,other\n1,2\n2,3\n", "is recognized as the held-out value"),
        ("rank,train_loss\n1,2\n2,3\n", "a training loss does not measure held-out data"),
        ("rank,value\n1.5,2\n2,3\n", "runs.csv:2: rank '1.5' is not allowed"),
        ("rank,value\n-1,2\n2,3\n", "runs.csv:2: rank '-1' is not allowed"),
        ("rank,value\nbig,2\n2,3\n", "runs.csv:2: rank 'big' is not allowed"),
        ("rank,value\n4,2\n4,2\n", "the trainings have only rank 4"),
        ("rank,value\n0,3\n4,2\n", "the trainings have only rank 4"),
        ('rank,value\n1,"2,1"\n2,"2,0"\n', "value is '2,1', not a number; write it with a decimal point"),
        (
            "rank;lr;value\n1;0.01;2,001\n2;0.01;2,002\n",
            "value is '2,001', not a number; write it with a decimal point",
        ),
        ("rank;value\n1;2,1\n2;2.0\n", "value is '2,1', not a number; write it with a decimal point"),
        ("rank,value\n1,1e308\n2,-1e308\n4,2\n", r"runs.csv:2: value is 1e+308; give a number from -1e+60 to 1e+60"),
        ("rank,value\n1,2\n2,-1e61\n", r"runs.csv:3: value is -1e+61; give a number from"),
        ("rank,train_loss,eval_loss\n1,1e308,2\n2,-1e308,3\n", r"runs.csv:2: train_loss is 1e+308; give a number from"),
        ("rank,eval_loss,eval_acc\n1,2,1e308\n2,3,-1e308\n", r"runs.csv:2: eval_acc is 1e+308; give a number from"),
        (
            "rank,std,value\n1,1e308,2\n2,0.1,3\n",
            r"runs.csv:2: std '1e308' is not allowed: give a standard deviation, from 0 to 1e+60",
        ),
        ("rank,item,tokens,value\n1,a,1e308,2\n2,a,1e308,3\n", r"runs.csv:2: weight '1e308' is not allowed"),
        ("rank,lr,value\n1,1e308,2\n2,1e-3,3\n", r"runs.csv:2: learning rate '1e308' is not allowed"),
        (
            "rank,value\n1,True\n2,False\n",
            "runs.csv:2: value is 'True', not a number; give the held-out number, or scores of 1 and 0",
        ),
        (
            "rank,item,value\n1,a,2\n1,b,2\n2,a,3\n2,b,nan\n",
            "runs.csv:5: rank 2 has no score for example b, which other trainings have",
        ),
        ("rank,value\n1,85%\n2,86%\n", "not a number; write it without the percent sign"),
        ("rank,use_rslora,value\n1,true,2\n2,false,3\n", "differ in column use_rslora"),
        ("rank,train_samples,value\n1,100,2\n2,200,3\n", "differ in column train_samples"),
        ("rank,epochs,value\n1,3,2\n2,1,3\n", "differ in column epochs"),
        (
            "rank,seed,lora_alpha,value\n1,0,16,2\n1,1,32,2.1\n2,0,16,3\n2,1,32,3.1\n",
            "column lora_alpha is neither constant",
        ),
        ("rank,value\n1,2\n2,two\n", "runs.csv:3: value is 'two', not a number"),
        ("rank,value\n1,2\n2,2\n4,2\n", "every training has the value 2"),
        ("rank,value\n1,2\n2,3\n2,4\n", "runs.csv:4: rank 2, seed 0 occurs twice with different values"),
        ("rank,metric,value\n1,loss,2\n1,acc,3\n2,loss,2\n", "differ in column metric"),
        ("rank,item,value\n1,a,2\n1,b,2\n2,a,3\n", "runs.csv:4: rank 2 is scored on other examples"),
        ("rank,item,tokens,value\n1,a,3,2\n1,b,1,2\n2,a,4,3\n2,b,1,3\n", "other token counts"),
        ("rank,std,value\n1,-0.1,2\n2,0.1,3\n", "runs.csv:2: std '-0.1' is not allowed"),
        ("rank,lr,value\n1,0,2\n2,1e-3,3\n", "runs.csv:2: learning rate '0' is not allowed"),
        ("rank,lr,value\n1,,2\n2,1e-3,3\n", "no learning rate, but other rows have one"),
        ("rank,seed,value\n1,x,2\n2,0,3\n", "runs.csv:2: seed 'x' is not allowed"),
        ("rank,perplexity\n1,-3\n2,3\n", "perplexity of -3 is not possible"),
        ("rank,accuracy\n1,0.81\n4,86\n", "accuracy is 0.81 in one training and 86 in another; write all as fractions"),
        ("rank,eval/acc\n1,0.9\n4,1.2\n", "eval/acc is 0.9 in one training and 1.2 in another"),
        ("rank,accuracy\n1,81\n4,860\n", "accuracy is 81 in one training and 860"),
        ("rank,value\n1,2,3\n2,3\n", "more cells than the header"),
    ],
)
def test_bad_tables_are_refused_with_file_and_row(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ResultsError, match=re.escape(message)) as caught:
        decide(write_table(tmp_path, text))
    assert "\n" not in str(caught.value)


WITHOUT_RESULT = "1 training without a result"
RUNNING = "Name,State,lora_r,eval/loss\na,finished,1,2.3\nb,finished,4,2.05\nc,finished,16,2.001\nd,%s,64,2.9\n"


@pytest.mark.parametrize(
    ("text", "ranks", "notes", "is_unstable"),
    [
        ("rank,lr,eval_loss\n1,1e-3,2.1\n4,1e-3,2.0\n4,1e-2,\n", [1, 4], [WITHOUT_RESULT], True),
        *(
            (f"rank,eval_loss\n4,2.05\n16,2.001\n64,{word}\n", [4, 16], [WITHOUT_RESULT], True)
            for word in ("OOM", "out of memory", "crashed", "nan", "NaN", "inf", "-Infinity")
        ),
        # The last value of a running training is from the middle, so rank 64 would look worse than it is.
        *((RUNNING % state, [1, 4, 16], ["1 unfinished training omitted"], False) for state in ("running", "RUNNING", "Scheduled", "waiting")),
        ("rank,eval_loss,state\n4,2.05,COMPLETE\n16,2.001,COMPLETE\n64,3,PRUNED\n", [4, 16], ["1 pruned training omitted"], False),
        ("rank,eval_loss,batch_size,note,empty\n4,2.05,8,first,\n16,2.001,8,again,\n", [4, 16], ["not used: batch_size, note"], False),
        ("rank,eval_loss\n4,2.05\n16,2.001\n16,2.001\n", [4, 16], ["1 repeated row omitted"], False),
        (
            "Name,State,peft_config.default.r,learning_rate,eval/loss,train/global_step\n"
            "a,finished,4,0.0003,2.10,100\nb,finished,8,0.0003,2.05,100\nc,finished,16,0.0003,2.04,100\n"
            "d,running,32,0.0003,2.30,40\ne,running,64,0.0003,,\nf,crashed,4,0.001,NaN,3\ng,finished,,,,\n",
            [4, 8, 16],
            ["1 row without a rank omitted", WITHOUT_RESULT, "2 unfinished trainings omitted"],
            True,
        ),
        (
            ",number,eval_loss,duration,params_lora_r,params_learning_rate,user_attrs_seed,state\n"
            "0,0,2.1,0 days 00:01:02,4,0.0003,0,COMPLETE\n1,1,2.05,0 days 00:01:02,8,0.0003,0,COMPLETE\n"
            "2,2,2.04,0 days 00:01:02,16,0.0003,0,COMPLETE\n3,3,,,32,0.0003,0,RUNNING\n4,4,2.5,,32,0.001,0,PRUNED\n",
            [4, 8, 16],
            ["rank from column params_lora_r", "1 unfinished training omitted"],
            False,
        ),
    ],
)  # fmt: skip
def test_rows_that_do_not_count_are_noted(
    tmp_path: Path, text: str, ranks: list[int], notes: list[str], is_unstable: bool
) -> None:
    decided = decide(write_table(tmp_path, text))
    assert [evidence.rank for evidence in decided.decision.ranks] == ranks
    assert set(notes) <= set(decided.input_notes)
    assert ("unstable" in decided.decision.flags) == is_unstable


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.csv", "no such file"), (".", "contains no results in a known format"), ("latin.csv", "not UTF-8")],
)
def test_a_path_without_a_table_is_refused(tmp_path: Path, name: str, message: str) -> None:
    if name == "latin.csv":
        (tmp_path / name).write_bytes("rank,größe\n1,2\n".encode("latin-1"))
    with pytest.raises(ResultsError, match=message):
        decide(tmp_path / name)


def test_trainings_of_unequal_length_are_flagged(tmp_path: Path) -> None:
    rows = [f"{rank},{step},{2 + 1 / rank}\n" for rank in (1, 4, 16) for step in (100, 200) if (rank, step) != (4, 200)]
    decision = decide(write_table(tmp_path, "rank,step,eval_loss\n" + "".join(rows)), margin=0.005).decision
    assert "unequal_length" in decision.flags
    assert next(run for run in decision.next_runs if run.action == "steps").ranks == [4]
    named_steps = [{"r": 4, "val_loss": 2.05, "steps": 100}, {"r": 16, "val_loss": 2.001, "steps": 50}]
    assert "unequal_length" in decide(named_steps).decision.flags


def test_one_number_per_rank_is_not_called_enough(tmp_path: Path) -> None:
    rows = build_evidence_table(decide(write_table(tmp_path, GOOD), margin=0.01, higher_is_better=False).decision)
    assert not any("yes" in row for row in rows)
    assert "perhaps" in rows[3]
    assert "best so far" in rows[-1]


def test_a_data_frame_is_decided_as_its_rows() -> None:
    rows = [{"rank": 4, "value": 2.05}, {"rank": 16, "value": 2.001}, {"rank": 64, "value": None}]
    decided = decide(pandas.DataFrame(rows), higher_is_better=False)
    assert decided.decision == decide(rows, higher_is_better=False).decision
    assert repr(decided) == "DecisionResult(rank=16, verdict='rising', margin=0.02001)"


@pytest.mark.parametrize(
    "name",
    ["value", "brier_gap", "fid_delta", "toxicity_score", "accuracy_drop", "1-acc", "lossless_acc", "energy_score"],
)
def test_a_metric_without_a_known_direction_is_refused(tmp_path: Path, name: str) -> None:
    path = write_table(tmp_path, f"rank,{name}\n1,0.5\n4,0.7\n16,0.701\n")
    with pytest.raises(
        ResultsError,
        match="its name does not tell whether higher or lower is better; give --higher-is-better or --lower-is-better",
    ):
        decide(path, metric=name)
    assert decide(path, metric=name, higher_is_better=True, margin=0.01).decision.rank == 4
    assert decide(path, metric=name, higher_is_better=False, margin=0.01).decision.reference_rank == 1


def test_the_direction_follows_the_metric_instead_of_its_column(tmp_path: Path) -> None:
    path = write_table(tmp_path, "rank,accuracy\n1,0.5\n4,0.7\n16,0.701\n")
    with pytest.raises(ResultsError, match="'energy_score'"):
        decide(path, metric="energy_score", columns={"value": "accuracy"})


def decide_values(table: object, **options: object) -> dict[int, float]:
    return {evidence.rank: evidence.value for evidence in decide(table, **options).decision.ranks}  # type: ignore[arg-type]


LOSSES = {4: 2.05, 16: 2.001, 64: 2.0}


def test_the_named_index_of_a_data_frame_is_a_column() -> None:
    frame = pandas.DataFrame({"eval_loss": LOSSES.values()}, index=pandas.Index(LOSSES, name="rank"))
    assert decide_values(frame) == LOSSES


def test_ranks_are_read_from_names(tmp_path: Path) -> None:
    path = write_table(
        tmp_path, "run,eval_loss\nlora-r4-seed0,2.05\nlora-r16-seed0,2.001\nlora-r64-seed0,2.0\nlora-r128-seed0,n/a\n"
    )
    assert decide_values(path) == LOSSES
    assert "rank read from the names of the trainings" in decide(path).input_notes
    assert (
        decide_values(pandas.DataFrame({"eval_loss": LOSSES.values()}, index=[f"r{rank}" for rank in LOSSES])) == LOSSES
    )
    with pytest.raises(ResultsError, match=r"none of the columns \(run, eval_loss\) is recognized as the rank"):
        decide(write_table(tmp_path, "run,eval_loss\nlora-r4-seed0,2.05\nbaseline,2.0\n"))


def test_ranks_are_read_from_file_names(tmp_path: Path) -> None:
    rows = {rank: "".join(f'{{"item": {n}, "loss": {loss + n}}}\n' for n in range(30)) for rank, loss in LOSSES.items()}
    for rank, text in rows.items():
        write_table(tmp_path, text, f"r{rank}-seed0.jsonl")
    assert decide_values(tmp_path) == pytest.approx({rank: loss + 14.5 for rank, loss in LOSSES.items()})


def test_a_stated_deviation_has_a_number_of_seeds(tmp_path: Path) -> None:
    path = write_table(tmp_path, "rank,accuracy,accuracy_std,n\n4,84.06,0.5,3\n16,85.0,0.5,3\n64,85.5,0.5,3\n")
    decision = decide(path).decision
    assert (decision.margin, decision.basis) == (0.5, "std")


@pytest.mark.parametrize(
    "text",
    [
        "rank,model,eval_loss\n4,gemma,2.05\n8,gemma,2.04\n32,llama,1.5\n64,llama,1.49\n",
        "rank,model,eval_loss\n4,gemma,2.05\n32,llama,1.5\n",
    ],
)
def test_trainings_of_two_kinds_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        ResultsError, match=r"the trainings differ in column model \(.*, so they cannot be compared; keep the"
    ):
        decide(write_table(tmp_path, text))


def test_names_and_texts_do_not_distinguish_kinds(tmp_path: Path) -> None:
    rows = ["rank,name,output_dir,item,subject,user,eval_loss\n"]
    for rank in LOSSES:
        rows += [
            f"{rank},run-{rank},out/{rank},{n},{'ab'[n % 2]},{'xy'[rank > 4]},{2 + n + 1 / rank}\n" for n in range(4)
        ]
    assert decide(write_table(tmp_path, "".join(rows))).decision.reference_rank == 64


def test_the_learning_rate_is_the_one_that_was_set(tmp_path: Path) -> None:
    text = "run_id,metrics.eval_loss,metrics.learning_rate,params.learning_rate,params.lora_r\n"
    path = write_table(tmp_path, text + "a,2.05,0.0035,0.005,4\nb,2.001,0.0035,0.005,16\n")
    assert decide(path).decision.learning_rate == 0.005


def test_a_default_margin_of_one_percent_has_a_note(tmp_path: Path) -> None:
    path = write_table(tmp_path, GOOD)
    note = (
        "margin: 1% of the best value, because the name 'value' states no unit (--metric NAME or --margin changes it)"
    )
    assert note in decide(path, higher_is_better=False).input_notes
    assert note not in decide(path, higher_is_better=False, margin=0.01).input_notes
    assert note not in decide(path, metric="eval_loss").input_notes


def test_a_metric_is_named_without_its_split() -> None:
    rows = [{"rank": rank, "eval/accuracy": 0.9 + rank / 1000, "eval/loss": 1.0} for rank in (1, 4, 16)]
    decided = decide(rows, metric="accuracy").decision
    assert (decided.metric, decided.higher_is_better, decided.reference_rank) == ("accuracy", True, 16)


@pytest.mark.parametrize("alpha", [lambda rank: 16, lambda rank: 2 * rank, lambda rank: 8 * rank**0.5])
def test_alphas_that_follow_one_rule_are_comparable(alpha: Any) -> None:
    assert decide([{"rank": rank, "lora_alpha": alpha(rank), "eval_loss": 2 + 1 / rank} for rank in (1, 4, 16)])


def test_other_metrics_have_their_own_answers() -> None:
    """Report both of two contradicting metrics."""
    rows = [{"rank": rank, "eval_loss": 2 + 0.1 * rank, "eval_accuracy": 0.5 + rank / 100} for rank in (1, 4, 16)]
    decided = decide(rows)
    assert decided.decision.rank == 1
    assert [(evidence.metric, evidence.rank) for evidence in decided.decision.other_metrics] == [("eval_accuracy", 16)]
    assert "metric_conflict" in decided.decision.flags


def test_short_seeds_are_read_from_names(tmp_path: Path) -> None:
    for rank, seed in product((2, 8), (0, 1)):
        write_table(tmp_path, f"step,eval_loss\n10,{2 - rank / 100 + seed / 1000}\n", f"run_r{rank}_s{seed}.csv")
    decided = decide(tmp_path, margin=0.01).decision
    assert [(evidence.rank, evidence.seeds) for evidence in decided.ranks] == [(2, 2), (8, 2)]


def test_a_study_is_decided_as_its_data_frame() -> None:
    class Study:
        directions = (SimpleNamespace(name="MAXIMIZE"),)

        def trials_dataframe(self) -> pandas.DataFrame:
            return pandas.DataFrame({"params_rank": [1, 4, 16], "value": [0.5, 0.7, 0.6], "state": ["COMPLETE"] * 3})

    decided = decide(Study(), margin=0.01).decision  # type: ignore[arg-type]
    assert (decided.reference_rank, decided.higher_is_better) == (4, True)


def test_the_best_evaluation_keeps_the_length_of_the_training() -> None:
    rows = [
        {"rank": rank, "step": step, "eval_loss": 2 + abs(step - best) / 1000 + 1 / rank}
        for rank, best in ((4, 200), (8, 100))
        for step in (100, 200)
    ]
    decided = decide(rows, checkpoint="best").decision
    assert "unequal_length" not in decided.flags
    assert not [run for run in decided.next_runs if run.action == "steps"]


CURVES = {4: (2.2, 2.1, 2.05), 16: (2.1, 2.02, 2.001), 64: (1.9, math.nan, math.nan)}


def make_curve_rows(missing: object) -> list[dict[str, Any]]:
    """Make three evaluations of each rank; rank 64 ends in NaN, which a table may contain as `missing`."""
    return [
        {"rank": rank, "step": step, "eval_loss": missing if math.isnan(loss) else loss}
        for rank, losses in CURVES.items()
        for step, loss in zip((100, 200, 300), losses, strict=True)
    ]


@pytest.mark.parametrize("missing", [math.nan, math.inf, "NaN", None])
@pytest.mark.parametrize("kind", ["memory", "frame", "csv", "jsonl", "trainer states"])
def test_a_training_that_ends_in_nan_has_no_result(tmp_path: Path, kind: str, missing: Any) -> None:
    rows = make_curve_rows(missing)
    frame = pandas.DataFrame(rows)
    source: Any = frame if kind == "frame" else rows
    if kind == "csv":
        source = write_table(tmp_path, frame.to_csv(index=False))
    elif kind == "jsonl":
        source = write_table(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "runs.jsonl")
    elif kind == "trainer states":
        write_states(tmp_path, {f"r{rank}": list(losses) for rank, losses in CURVES.items()})
        source = tmp_path
    for checkpoint in ("last", "best"):
        decided = decide(source, margin=0.005, checkpoint=checkpoint)  # type: ignore[arg-type]
        assert [evidence.rank for evidence in decided.decision.ranks] == [4, 16]
        assert "1 training without a result" in decided.input_notes
        assert "unstable" in decided.decision.flags


def test_a_status_of_failure_at_the_last_evaluation_counts_too(tmp_path: Path) -> None:
    text = "run,state,rank,step,eval_loss\n" + "".join(
        f"{run},{'crashed' if (rank, step) == (64, 200) else 'finished'},{rank},{step},{2 + 1 / rank}\n"
        for run, rank in (("a", 4), ("b", 16), ("c", 64))
        for step in (100, 200)
    )
    assert [evidence.rank for evidence in decide(write_table(tmp_path, text), margin=0.005).decision.ranks] == [4, 16]


def test_a_training_that_was_run_again_counts(tmp_path: Path) -> None:
    text = "run,rank,step,eval_loss\na,4,100,2.1\nb,16,200,nan\nc,16,100,2.0\nd,64,50,nan\nd,64,100,1.99\n"
    decided = decide(write_table(tmp_path, text), margin=0.005)
    assert [evidence.rank for evidence in decided.decision.ranks] == [4, 16, 64]
    assert "unstable" not in decided.decision.flags


def test_rows_with_only_a_training_loss_are_not_evaluations() -> None:
    rows = [
        {"rank": rank, "step": step, "loss": 1.0, "eval_loss": 2 + 1 / rank if step % 50 == 0 else None}
        for rank in LOSSES
        for step in range(10, 120, 10)
    ]
    decided = decide(rows, margin=0.005)
    assert [evidence.rank for evidence in decided.decision.ranks] == list(LOSSES)
    assert "unstable" not in decided.decision.flags


def test_other_metrics_are_read_at_the_last_evaluation() -> None:
    rows = [
        {"rank": rank, "step": step, "eval_loss": 2 + 1 / rank, "eval_accuracy": accuracy}
        for rank, accuracies in ((4, (0.5, 0.6)), (16, (0.6, 0.7)), (64, (0.9, math.nan)))
        for step, accuracy in reversed(list(zip((100, 200), accuracies, strict=True)))
    ]
    other_metric = decide(rows).decision.other_metrics[0]
    assert {evidence.rank: evidence.value for evidence in other_metric.ranks} == {4: 0.6, 16: 0.7}


def score_example(rank: int, example: int) -> float:
    return 2 + example / 80 + 1 / rank


EXAMPLE_ROWS = [
    {"rank": rank, "item": f"q{example}", "eval_loss": score_example(rank, example)}
    for rank in (4, 16)
    for example in range(80)
]
NO_SCORE = "1 example without a score omitted (q7)"


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        (EXAMPLE_ROWS, None),
        *(
            ([row | {"eval_loss": missing} if row["item"] == "q7" else row for row in EXAMPLE_ROWS], NO_SCORE)
            for missing in (math.nan, None)
        ),
        # An answer that was cut, as `to_pandas(run, examples=True)` writes it, has no weight.
        ([row | ({"tokens": 0, "eval_loss": None} if row["item"] == "q7" else {"tokens": 5}) for row in EXAMPLE_ROWS], NO_SCORE),
        ([*EXAMPLE_ROWS, *(row | {"rank": 64, "eval_loss": math.nan} for row in EXAMPLE_ROWS[:80])], WITHOUT_RESULT),
    ],
    ids=["complete", "nan", "none", "no tokens", "a training without any"],
)  # fmt: skip
def test_examples_without_a_score_are_named(rows: list[dict[str, Any]], note: str | None) -> None:
    decided = decide(rows)
    assert [evidence.rank for evidence in decided.decision.ranks] == [4, 16]
    assert decided.decision.basis == "examples"
    assert [line for line in decided.input_notes if "without a" in line] == ([] if note is None else [note])


def test_a_score_that_became_nan_is_missing() -> None:
    rows = [
        {
            **row,
            "step": step,
            "eval_loss": math.nan if (row["rank"], row["item"], step) == (16, "q7", 20) else row["eval_loss"],
        }
        for row in EXAMPLE_ROWS
        for step in (10, 20)
    ]
    with pytest.raises(ResultsError, match="rank 16 has no score for example q7"):
        decide(rows)


def test_other_metrics_of_examples_are_averaged() -> None:
    rows = [row | {"eval_accuracy": float(int(row["item"][1:]) < 79)} for row in EXAMPLE_ROWS]
    assert decide(rows, metric="eval_loss").decision.other_metrics == []
    shared = [row | {"eval_accuracy": 0.5 + row["rank"] / 100} for row in rows]
    assert [evidence.metric for evidence in decide(shared, metric="eval_loss").decision.other_metrics] == [
        "eval_accuracy"
    ]


@pytest.mark.parametrize("truth", [bool, np.bool_])
def test_booleans_are_not_losses(truth: Any) -> None:
    rows = [{"rank": rank, "eval_loss": truth(rank < 5)} for rank in (1, 4, 16)]
    with pytest.raises(ResultsError, match=r"row 1: eval_loss is .*True.*, not a number"):
        decide(rows)
    with pytest.raises(ResultsError, match=r"rank .*True.* is not allowed"):
        decide([{"rank": truth(1), "eval_loss": 2.0}, {"rank": 4, "eval_loss": 2.1}])


@pytest.mark.parametrize(("name", "cell"), [("runs.csv", ";"), ("runs.tsv", "\t")])
def test_decimal_commas_are_read_with_other_delimiters(tmp_path: Path, name: str, cell: str) -> None:
    lines = ["rank,lr,run,state,eval_loss", "4,1e-4,a|b,finished,2|05", "16,0|0001,c,finished,2|001"]
    lines += ["64,1|0E-4,1|2,finished,2", "64,1e-3,d,crashed,NaN"]
    path = write_table(tmp_path, "\n".join(lines).replace(",", cell).replace("|", ",") + "\n", name)
    decision = decide(path, margin=0.005).decision
    assert {evidence.rank: (evidence.value, evidence.learning_rate) for evidence in decision.ranks} == {
        rank: (loss, 1e-4) for rank, loss in LOSSES.items()
    }


def test_rows_that_occur_twice_name_the_columns_in_which_they_differ() -> None:
    rows = [{"rank": 4, "warmup": "a", "eval_loss": 2.0}, {"rank": 4, "warmup": "b", "eval_loss": 2.1}]
    with pytest.raises(
        ResultsError, match=r"occurs twice with different values .*; they also differ in warmup; keep the rows of one"
    ):
        decide([*rows, {"rank": 16, "warmup": "a", "eval_loss": 1.9}])


TRAINER_LOSSES = {1: 2.3, 4: 2.001, 16: 2.0}


def test_trainer_states_next_to_their_adapters(tmp_path: Path) -> None:
    for rank, loss in TRAINER_LOSSES.items():
        for step in (50, 100):
            folder = tmp_path / f"run-{rank}" / f"checkpoint-{step}"
            folder.mkdir(parents=True)
            (folder / "adapter_config.json").write_text(json.dumps({"r": rank, "peft_type": "LORA"}))
            history = [{"step": at, "eval_loss": loss + (100 - at) / 100, "epoch": 1} for at in (50, 100) if at <= step]
            history.append({"step": step, "loss": 1.0, "learning_rate": 1e-4})
            (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))
    decision = decide(tmp_path, margin=0.005).decision
    assert decision.rank == 4
    assert {e.rank: e.value for e in decision.ranks} == TRAINER_LOSSES


def test_the_rank_may_be_in_the_folder_name(tmp_path: Path) -> None:
    for rank, loss in TRAINER_LOSSES.items():
        folder = tmp_path / f"llama-lora-r{rank}-lr1e-4-seed0"
        folder.mkdir()
        state = {"global_step": 10, "log_history": [{"step": 10, "eval_loss": loss}]}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    decision = decide(tmp_path, margin=0.005).decision
    assert (decision.rank, decision.learning_rate) == (4, 1e-4)


def test_events_beside_checkpoints_take_the_rank_from_their_adapters(tmp_path: Path) -> None:
    from rightrank.tables.columns import infer_settings_from_path

    for rank in (2, 8):
        checkpoint = tmp_path / f"run-{'ab'[rank == 8]}" / "checkpoint-5"
        checkpoint.mkdir(parents=True)
        (checkpoint / "adapter_config.json").write_text(json.dumps({"r": rank}))
        (checkpoint.parent / "runs" / "monday").mkdir(parents=True)
    assert infer_settings_from_path(tmp_path / "run-a" / "runs" / "monday", tmp_path)["rank"] == 2
    assert infer_settings_from_path(tmp_path / "run-b" / "checkpoint-5", tmp_path)["rank"] == 8


def test_a_study_of_optuna_is_a_data_frame(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(direction="maximize")
    for rank, loss in TRAINER_LOSSES.items():
        study.enqueue_trial({"rank": rank})
        study.optimize(lambda trial, loss=loss: -loss + 0 * trial.suggest_int("rank", 1, 64), n_trials=1)
    frame = study.trials_dataframe()
    frame.to_csv(tmp_path / "study.csv", index=False)
    for source in (frame, tmp_path / "study.csv"):
        decision = decide(source, higher_is_better=True, margin=0.005).decision
        assert (decision.rank, {evidence.rank: -evidence.value for evidence in decision.ranks}) == (4, TRAINER_LOSSES)


@pytest.mark.filterwarnings("ignore")  # warnings of MLflow
def test_the_runs_of_mlflow_are_a_data_frame(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("lora")
    for rank, loss in TRAINER_LOSSES.items():
        run = client.create_run(experiment).info.run_id
        client.log_param(run, "lora_r", rank)
        client.log_metric(run, "eval_loss", loss)
        client.set_terminated(run)
    previous_uri = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    try:
        assert decide(mlflow.search_runs([experiment]), margin=0.005).decision.rank == 4
    finally:
        mlflow.set_tracking_uri(previous_uri)


def test_a_database_and_mlflow_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"SQLite format 3\x00")
    with pytest.raises(ResultsError, match=r"study\.db: files of type '\.db' are not supported; give a file ending in"):
        decide(tmp_path / "study.db")
    (tmp_path / "mlruns" / "0").mkdir(parents=True)
    (tmp_path / "mlruns" / "0" / "meta.yaml").write_text("name: lora\n")
    with pytest.raises(ResultsError, match=r"mlruns: the folder contains no results in a known format"):
        decide(tmp_path / "mlruns")


def write_states(root: Path, losses: dict[str, list[float]], ranks: dict[str, int] | None = None) -> None:
    """Write a trainer_state.json for each folder, and the adapter's configuration where `ranks` has one."""
    for name, curve in losses.items():
        folder = root / name
        folder.mkdir(parents=True)
        history = [{"step": 50 * number, "eval_loss": loss} for number, loss in enumerate(curve, start=1)]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 50 * len(curve), "log_history": history}))
        if ranks is not None:
            (folder / "adapter_config.json").write_text(json.dumps({"r": ranks[name]}))


@pytest.mark.parametrize(
    "names",
    [
        ["deepseek-r1-lora-r4", "deepseek-r2-lora-r8"],
        ["DeepSeek-R1-Distill-Qwen-1.5B-r4", "DeepSeek-R1-Distill-Qwen-1.5B-r8"],
        ["command-r7b-r4", "command-r7b-r8"],
        ["exp-r1/lora-r4", "exp-r2/lora-r8"],
        ["r1-sweep-rank4", "r2-sweep-rank8"],
        ["rank4-round-r1", "rank8-round-r1"],
        ["deepseek-r1-rank4-lr1e-4-seed0-s100", "deepseek-r1-rank8-lr1e-4-seed0-s100"],
    ],
)
@pytest.mark.parametrize("kind", ["folders", "files", "column"])
def test_the_rank_is_not_read_from_the_model_s_name(tmp_path: Path, names: list[str], kind: str) -> None:
    losses = dict(zip(names, (2.05, 2.0), strict=True))
    if kind == "folders":
        write_states(tmp_path, {name: [loss] for name, loss in losses.items()})
    elif kind == "files":
        for name, loss in losses.items():
            (tmp_path / f"{name.replace('/', '-')}.csv").write_text(f"eval_loss\n{loss}\n")
    else:
        (tmp_path / "runs.csv").write_text("run,eval_loss\n" + "".join(f"{n},{v}\n" for n, v in losses.items()))
    decision = decide(tmp_path if kind != "column" else tmp_path / "runs.csv", margin=0.005).decision
    assert {evidence.rank: evidence.value for evidence in decision.ranks} == {4: 2.05, 8: 2.0}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-r1-r4", "model-r1-r8"], "the name states rank 1 and 4; name the training so that it states one"),
        (["lora-r1-qwen-r4", "lora-r1-qwen-r8"], "the name states rank 1 and 4"),
        (["r4/r1", "r8/r1"], "the name states rank 4 and 1"),
        (["rank4-rank16", "rank8-rank16"], "the name states rank 4 and 16"),
        (["r4-lr1e-5-lr1e-3", "r8-lr1e-5-lr1e-3"], "the name states learning rate 1e-5 and 1e-3"),
        (["r4-seed1-seed2", "r8-seed1-seed2"], "the name states seed 1 and 2"),
        (["r4-s1-s200", "r8-s1-s200"], "the name states seed 1 and 200"),
    ],
)
def test_names_with_ambiguous_numbers_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    write_states(tmp_path / "folders", {name: [2.0] for name in names})
    table = tmp_path / "runs.csv"
    table.write_text("run,eval_loss\n" + "".join(f"{name},{number}\n" for number, name in enumerate(names)))
    for source in (tmp_path / "folders", table):
        with pytest.raises(ResultsError, match=message):
            decide(source)


def test_a_recorded_rank_overrides_ambiguous_names(tmp_path: Path) -> None:
    write_states(tmp_path, {"r1-r4": [2.05], "r1-r8": [2.0]}, ranks={"r1-r4": 4, "r1-r8": 8})
    assert [evidence.rank for evidence in decide(tmp_path, margin=0.005).decision.ranks] == [4, 8]


def test_columns_that_name_other_ranks_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    table.write_text("model,run,eval_loss\nfoo-r1,lora-r4,2.05\nfoo-r2,lora-r8,2.0\n")
    with pytest.raises(ResultsError, match="columns model and run name other ranks; give a column rank"):
        decide(table)
