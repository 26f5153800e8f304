"""Tables that others made: what is understood, and what is refused with file and row."""

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
from rightrank.report.evidence_tables import evidence_table
from rightrank.schema.errors import ResultsError

GOOD = "rank,value\n1,2.3\n4,2.05\n16,2.001\n64,2.0\n"


def write(folder: Path, text: str, name: str = "runs.csv") -> Path:
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
def test_near_names_are_understood(tmp_path: Path, text: str) -> None:
    decided = decide(write(tmp_path, text), margin=0.005, higher_is_better=False)
    assert decided.decision.rank == 16
    assert decided.decision.higher_is_better is False


def test_jsonl_and_memory_read_alike(tmp_path: Path) -> None:
    rows = [{"rank": rank, "value": value} for rank, value in ((1, 2.3), (4, 2.05), (16, 2.001), (64, 2.0))]
    path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "runs.jsonl")
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
    decided = decide(write(tmp_path, json.dumps(runs), "wandb.json"), margin=0.005)
    assert decided.decision.rank == 4
    assert decided.decision.learning_rate == 1e-4


def test_the_metric_says_its_direction_and_the_user_overrules_it(tmp_path: Path) -> None:
    path = write(tmp_path, "rank,accuracy\n1,0.5\n4,0.7\n16,0.701\n")
    assert decide(path).decision.rank == 4
    assert decide(path, higher_is_better=False).decision.reference_rank == 1


def test_a_metric_of_any_known_name_is_found_and_never_a_training_one(tmp_path: Path) -> None:
    decided = decide(write(tmp_path, "rank,BLEU,train_bleu\n1,60,1\n4,69.5,2\n16,70,3\n"))
    assert (decided.decision.metric, decided.decision.rank) == ("BLEU", 4)


@pytest.mark.parametrize("loss", ["metrics.loss", "metrics/loss", "summary.loss", "loss"])
@pytest.mark.parametrize("beside", ["train_loss", "metrics.train_loss", "train/loss", "train_runtime", "grad_norm"])
def test_a_loss_that_may_be_of_the_training_is_asked_for(loss: str, beside: str) -> None:
    rows = [{"rank": rank, loss: 1.0 / rank, beside: 2.0 / rank} for rank in (1, 4, 16)]
    with pytest.raises(ResultsError, match=f"{loss} may be the loss of the training.*--metric {loss}"):
        decide(rows)
    assert decide(rows, metric=loss, margin=0.01).decision.reference_rank == 16
    held_out = [{**row, "eval_loss": 1.0 + 0.1 * row["rank"]} for row in rows]
    decided = decide(held_out, margin=0.01).decision
    assert (decided.metric, decided.reference_rank, decided.flags) == ("eval_loss", 1, ["underpowered", "one_seed"])


def test_a_column_is_named_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path, "groesse,guete\n1,2.3\n4,2.001\n16,2.0\n")
    assert (
        decide(path, columns={"rank": "groesse", "value": "guete"}, margin=0.005, higher_is_better=False).decision.rank
        == 4
    )
    with pytest.raises(ResultsError, match="no column for the rank"):
        decide(path, higher_is_better=False)
    with pytest.raises(ResultsError, match="has no column 'x'"):
        decide(path, columns={"rank": "x"}, higher_is_better=False)


def test_items_seeds_and_tokens_are_paired_and_weighted(tmp_path: Path) -> None:
    lines = ["rank,seed,item,tokens,value"]
    for rank, shift in ((1, 0.2), (4, 0.0)):
        for seed in (0, 1):
            for item in range(20):
                lines.append(f"{rank},{seed},{item},{1 + item % 3},{2 + 0.1 * item + shift + 0.001 * seed}")
    decision = decide(write(tmp_path, "\n".join(lines) + "\n"), margin=0.01, higher_is_better=False).decision
    assert decision.basis == "items and seeds"
    evidence = decision.ranks[0]
    assert evidence.difference == pytest.approx(0.2)
    tokens = [1 + item % 3 for item in range(20)]
    mean = sum((2 + 0.1 * item) * count for item, count in enumerate(tokens)) / sum(tokens)
    assert decision.ranks[1].value == pytest.approx(mean + 0.0005)


def test_evaluations_along_the_training_end_in_the_last(tmp_path: Path) -> None:
    text = "rank,step,eval_loss\n" + "".join(
        f"{rank},{step},{3 - step / 100 - rank / 1000}\n" for rank in (1, 4) for step in (25, 50, 75, 100)
    )
    decision = decide(write(tmp_path, text), margin=0.005).decision
    assert decision.ranks[0].value == pytest.approx(2 - 0.001)


def test_a_training_without_a_result_is_missing_and_flagged(tmp_path: Path) -> None:
    path = write(tmp_path, "rank,lr,value\n1,1e-3,2.1\n4,1e-3,2.0\n4,1e-2,\n")
    assert "unstable" in decide(path, higher_is_better=False).decision.flags


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("rank,value\n", "a header and no rows"),
        ("size,value\n1,2\n2,3\n", "no column for the rank among size, value"),
        ("rank,other\n1,2\n2,3\n", "no column for the held-out value"),
        ("rank,train_loss\n1,2\n2,3\n", "a training loss does not measure held-out data"),
        ("rank,value\n1.5,2\n2,3\n", "runs.csv:2: rank '1.5' is not allowed"),
        ("rank,value\n-1,2\n2,3\n", "runs.csv:2: rank '-1' is not allowed"),
        ("rank,value\nbig,2\n2,3\n", "runs.csv:2: rank 'big' is not allowed"),
        ("rank,value\n4,2\n4,2\n", "one rank only"),
        ("rank,value\n0,3\n4,2\n", "one rank only"),
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
            "column lora_alpha is neither the same",
        ),
        ("rank,value\n1,2\n2,two\n", "runs.csv:3: value is 'two', not a number"),
        ("rank,value\n1,2\n2,2\n4,2\n", "every training has the value 2"),
        ("rank,value\n1,2\n2,3\n2,4\n", "runs.csv:4: rank 2, seed 0 occurs twice with different values"),
        ("rank,metric,value\n1,loss,2\n1,acc,3\n2,loss,2\n", "differ in column metric"),
        ("rank,item,value\n1,a,2\n1,b,2\n2,a,3\n", "runs.csv:4: rank 2 is scored on other examples"),
        ("rank,item,tokens,value\n1,a,3,2\n1,b,1,2\n2,a,4,3\n2,b,1,3\n", "other token counts"),
        ("rank,std,value\n1,-0.1,2\n2,0.1,3\n", "runs.csv:2: std '-0.1' is not allowed"),
        ("rank,lr,value\n1,0,2\n2,1e-3,3\n", "runs.csv:2: learning rate '0' is not allowed"),
        ("rank,lr,value\n1,,2\n2,1e-3,3\n", "no learning rate, though other rows have one"),
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
        decide(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_rows_that_repeat_are_left_out_and_said(tmp_path: Path) -> None:
    decided = decide(write(tmp_path, GOOD + "64,2.0\n"), margin=0.005, higher_is_better=False)
    assert decided.decision.rank == 16
    assert "1 repeated row left out" in decided.understood


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes("rank,größe\n1,2\n".encode("latin-1"))
    with pytest.raises(ResultsError, match="not UTF-8"):
        decide(path)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="no such file"):
        decide(tmp_path / "none.csv")
    with pytest.raises(ResultsError, match="holds no known results"):
        decide(tmp_path)


@pytest.mark.parametrize("status", ["running", "RUNNING", "Scheduled", "waiting"])
def test_trainings_that_still_run_are_not_counted(tmp_path: Path, status: str) -> None:
    """The last value of a training that runs is one part of the way: rank 64 would look worse than it is."""
    text = f"Name,State,lora_r,eval/loss\na,finished,1,2.3\nb,finished,4,2.05\nc,finished,16,2.001\nd,{status},64,2.9\n"
    decided = decide(write(tmp_path, text), margin=0.005)
    assert [evidence.rank for evidence in decided.decision.ranks] == [1, 4, 16]
    assert "1 unfinished training left out" in decided.understood
    assert "unstable" not in decided.decision.flags


def test_trainings_of_unequal_length_are_flagged(tmp_path: Path) -> None:
    rows = [f"{rank},{step},{2 + 1 / rank}\n" for rank in (1, 4, 16) for step in (100, 200) if (rank, step) != (4, 200)]
    decision = decide(write(tmp_path, "rank,step,eval_loss\n" + "".join(rows)), margin=0.005).decision
    assert "unequal_length" in decision.flags
    assert next(run for run in decision.next_runs if run.action == "steps").ranks == [4]


def test_a_wandb_table_with_unfinished_and_crashed_runs(tmp_path: Path) -> None:
    text = (
        "Name,State,peft_config.default.r,learning_rate,eval/loss,train/global_step\n"
        "a,finished,4,0.0003,2.10,100\nb,finished,8,0.0003,2.05,100\nc,finished,16,0.0003,2.04,100\n"
        "d,running,32,0.0003,2.30,40\ne,running,64,0.0003,,\nf,crashed,4,0.001,NaN,3\ng,finished,,,,\n"
    )
    decided = decide(write(tmp_path, text))
    assert [one.rank for one in decided.decision.ranks] == [4, 8, 16]
    assert decided.understood[-3:] == [
        "1 row without a rank left out",
        "1 training without a result",
        "2 unfinished trainings left out",
    ]


def test_optuna_s_dataframe(tmp_path: Path) -> None:
    text = (
        ",number,value,duration,params_lora_r,params_learning_rate,user_attrs_seed,state\n"
        "0,0,2.1,0 days 00:01:02,4,0.0003,0,COMPLETE\n1,1,2.05,0 days 00:01:02,8,0.0003,0,COMPLETE\n"
        "2,2,2.04,0 days 00:01:02,16,0.0003,0,COMPLETE\n3,3,,,32,0.0003,0,RUNNING\n4,4,2.5,,32,0.001,0,PRUNED\n"
    )
    decided = decide(write(tmp_path, text), higher_is_better=False)
    assert [one.rank for one in decided.decision.ranks] == [4, 8, 16]
    assert "rank from column params_lora_r" in decided.understood
    assert "1 unfinished training left out" in decided.understood


def test_one_number_a_rank_is_not_called_enough(tmp_path: Path) -> None:
    rows = evidence_table(decide(write(tmp_path, GOOD), margin=0.01, higher_is_better=False).decision)
    assert not any("yes" in row for row in rows)
    assert "perhaps" in rows[3]
    assert "best so far" in rows[-1]


def test_a_column_named_steps_shows_trainings_of_unequal_length() -> None:
    rows = [{"r": 4, "val_loss": 2.05, "steps": 100}, {"r": 16, "val_loss": 2.001, "steps": 50}]
    assert "unequal_length" in decide(rows).decision.flags


def test_a_data_frame_is_decided_as_its_rows() -> None:
    rows = [{"rank": 4, "value": 2.05}, {"rank": 16, "value": 2.001}, {"rank": 64, "value": None}]
    decided = decide(pandas.DataFrame(rows), higher_is_better=False)
    assert decided.decision == decide(rows, higher_is_better=False).decision
    assert repr(decided) == "Decided(rank=16, verdict='rising', margin=0.02001)"


@pytest.mark.parametrize(
    "name",
    ["value", "brier_gap", "fid_delta", "toxicity_score", "accuracy_drop", "1-acc", "lossless_acc", "energy_score"],
)
def test_a_metric_without_a_known_direction_is_asked_for_it(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, f"rank,{name}\n1,0.5\n4,0.7\n16,0.701\n")
    with pytest.raises(ResultsError, match="not known from its name; give --higher-is-better or --lower-is-better"):
        decide(path, metric=name)
    assert decide(path, metric=name, higher_is_better=True, margin=0.01).decision.rank == 4
    assert decide(path, metric=name, higher_is_better=False, margin=0.01).decision.reference_rank == 1


def test_the_direction_is_that_of_the_metric_and_not_of_the_column_that_holds_it(tmp_path: Path) -> None:
    path = write(tmp_path, "rank,accuracy\n1,0.5\n4,0.7\n16,0.701\n")
    with pytest.raises(ResultsError, match="'energy_score'"):
        decide(path, metric="energy_score", columns={"value": "accuracy"})


def by_rank(table: object, **asked: object) -> dict[int, float]:
    return {one.rank: one.value for one in decide(table, **asked).decision.ranks}  # type: ignore[arg-type]


LOSSES = {4: 2.05, 16: 2.001, 64: 2.0}


def test_the_named_index_of_a_data_frame_is_a_column() -> None:
    frame = pandas.DataFrame({"eval_loss": LOSSES.values()}, index=pandas.Index(LOSSES, name="rank"))
    assert by_rank(frame) == LOSSES


def test_names_alone_say_the_ranks(tmp_path: Path) -> None:
    path = write(
        tmp_path, "run,eval_loss\nlora-r4-seed0,2.05\nlora-r16-seed0,2.001\nlora-r64-seed0,2.0\nlora-r128-seed0,n/a\n"
    )
    assert by_rank(path) == LOSSES
    assert "rank from the names of the trainings" in decide(path).understood
    assert by_rank(pandas.DataFrame({"eval_loss": LOSSES.values()}, index=[f"r{rank}" for rank in LOSSES])) == LOSSES
    with pytest.raises(ResultsError, match="no column for the rank among run, eval_loss"):
        decide(write(tmp_path, "run,eval_loss\nlora-r4-seed0,2.05\nbaseline,2.0\n"))


def test_several_files_say_their_rank_by_name(tmp_path: Path) -> None:
    rows = {rank: "".join(f'{{"item": {n}, "loss": {loss + n}}}\n' for n in range(30)) for rank, loss in LOSSES.items()}
    for rank, text in rows.items():
        write(tmp_path, text, f"r{rank}-seed0.jsonl")
    assert by_rank(tmp_path) == pytest.approx({rank: loss + 14.5 for rank, loss in LOSSES.items()})


def test_a_stated_deviation_is_that_of_so_many_seeds(tmp_path: Path) -> None:
    path = write(tmp_path, "rank,accuracy,accuracy_std,n\n4,84.06,0.5,3\n16,85.0,0.5,3\n64,85.5,0.5,3\n")
    decision = decide(path).decision
    assert (decision.margin, decision.basis) == (0.5, "std")


@pytest.mark.parametrize("word", ["OOM", "out of memory", "crashed", "nan", "NaN", "inf", "-Infinity"])
def test_a_word_of_failure_is_a_training_without_a_result(tmp_path: Path, word: str) -> None:
    decided = decide(write(tmp_path, f"rank,eval_loss\n4,2.05\n16,2.001\n64,{word}\n"))
    assert "unstable" in decided.decision.flags
    assert "1 training without a result" in decided.understood


def test_a_pruned_training_is_not_unstable(tmp_path: Path) -> None:
    decided = decide(write(tmp_path, "rank,eval_loss,state\n4,2.05,COMPLETE\n16,2.001,COMPLETE\n64,3,PRUNED\n"))
    assert "unstable" not in decided.decision.flags
    assert "1 pruned training left out" in decided.understood


def test_columns_that_are_not_used_are_listed(tmp_path: Path) -> None:
    text = "rank,eval_loss,batch_size,note,empty\n4,2.05,8,first,\n16,2.001,8,again,\n"
    assert "not used: batch_size, note" in decide(write(tmp_path, text)).understood


@pytest.mark.parametrize(
    "text",
    [
        "rank,model,eval_loss\n4,gemma,2.05\n8,gemma,2.04\n32,llama,1.5\n64,llama,1.49\n",
        "rank,model,eval_loss\n4,gemma,2.05\n32,llama,1.5\n",
    ],
)
def test_trainings_of_two_kinds_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ResultsError, match=r"the trainings differ in column model \(.*, which is not used; keep the"):
        decide(write(tmp_path, text))


def test_names_of_trainings_and_texts_of_examples_are_no_kinds(tmp_path: Path) -> None:
    rows = ["rank,name,output_dir,item,subject,user,eval_loss\n"]
    for rank in LOSSES:
        rows += [
            f"{rank},run-{rank},out/{rank},{n},{'ab'[n % 2]},{'xy'[rank > 4]},{2 + n + 1 / rank}\n" for n in range(4)
        ]
    assert decide(write(tmp_path, "".join(rows))).decision.reference_rank == 64


def test_the_learning_rate_is_the_one_that_was_set(tmp_path: Path) -> None:
    text = "run_id,metrics.eval_loss,metrics.learning_rate,params.learning_rate,params.lora_r\n"
    path = write(tmp_path, text + "a,2.05,0.0035,0.005,4\nb,2.001,0.0035,0.005,16\n")
    assert decide(path).decision.learning_rate == 0.005


def test_a_default_margin_of_one_percent_is_said_with_its_reason(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    said = "margin: 1% of the best, as the name 'value' says no unit (--metric NAME or --margin changes it)"
    assert said in decide(path, higher_is_better=False).understood
    assert said not in decide(path, higher_is_better=False, margin=0.01).understood
    assert said not in decide(path, metric="eval_loss").understood


def test_a_metric_is_named_without_its_split() -> None:
    rows = [{"rank": rank, "eval/accuracy": 0.9 + rank / 1000, "eval/loss": 1.0} for rank in (1, 4, 16)]
    decided = decide(rows, metric="accuracy").decision
    assert (decided.metric, decided.higher_is_better, decided.reference_rank) == ("accuracy", True, 16)


@pytest.mark.parametrize("alpha", [lambda rank: 16, lambda rank: 2 * rank, lambda rank: 8 * rank**0.5])
def test_an_alpha_of_one_rule_is_comparable(alpha: Any) -> None:
    assert decide([{"rank": rank, "lora_alpha": alpha(rank), "eval_loss": 2 + 1 / rank} for rank in (1, 4, 16)])


def test_the_answers_by_the_other_metrics_stand_beside() -> None:
    """The table has two metrics that contradict each other: both are said."""
    rows = [{"rank": rank, "eval_loss": 2 + 0.1 * rank, "eval_accuracy": 0.5 + rank / 100} for rank in (1, 4, 16)]
    decided = decide(rows)
    assert decided.decision.rank == 1
    assert [(one.metric, one.rank) for one in decided.decision.other_metrics] == [("eval_accuracy", 16)]
    assert "metric_conflict" in decided.decision.flags


def test_names_with_a_short_seed_say_it(tmp_path: Path) -> None:
    for rank, seed in product((2, 8), (0, 1)):
        write(tmp_path, f"step,eval_loss\n10,{2 - rank / 100 + seed / 1000}\n", f"run_r{rank}_s{seed}.csv")
    decided = decide(tmp_path, margin=0.01).decision
    assert [(one.rank, one.seeds) for one in decided.ranks] == [(2, 2), (8, 2)]


def test_a_study_is_decided_as_its_data_frame() -> None:
    class Study:
        directions = (SimpleNamespace(name="MAXIMIZE"),)

        def trials_dataframe(self) -> pandas.DataFrame:
            return pandas.DataFrame({"params_rank": [1, 4, 16], "value": [0.5, 0.7, 0.6], "state": ["COMPLETE"] * 3})

    decided = decide(Study(), margin=0.01).decision  # type: ignore[arg-type]
    assert (decided.reference_rank, decided.higher_is_better) == (4, True)


def test_the_best_evaluation_leaves_the_length_of_the_training() -> None:
    rows = [
        {"rank": rank, "step": step, "eval_loss": 2 + abs(step - best) / 1000 + 1 / rank}
        for rank, best in ((4, 200), (8, 100))
        for step in (100, 200)
    ]
    decided = decide(rows, checkpoint="best").decision
    assert "unequal_length" not in decided.flags
    assert not [run for run in decided.next_runs if run.action == "steps"]


CURVES = {4: (2.2, 2.1, 2.05), 16: (2.1, 2.02, 2.001), 64: (1.9, math.nan, math.nan)}


def curve_rows(missing: object) -> list[dict[str, Any]]:
    """Three evaluations of each rank; rank 64 ends in NaN, which a table may hold as `missing`."""
    return [
        {"rank": rank, "step": step, "eval_loss": missing if math.isnan(loss) else loss}
        for rank, losses in CURVES.items()
        for step, loss in zip((100, 200, 300), losses, strict=True)
    ]


@pytest.mark.parametrize("missing", [math.nan, math.inf, "NaN", None])
@pytest.mark.parametrize("kind", ["memory", "frame", "csv", "jsonl"])
def test_a_training_that_ends_in_nan_has_no_result(tmp_path: Path, kind: str, missing: Any) -> None:
    rows = curve_rows(missing)
    frame = pandas.DataFrame(rows)
    source: Any = frame if kind == "frame" else rows
    if kind == "csv":
        source = write(tmp_path, frame.to_csv(index=False))
    elif kind == "jsonl":
        source = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows), "runs.jsonl")
    for checkpoint in ("last", "best"):
        decided = decide(source, margin=0.005, checkpoint=checkpoint)  # type: ignore[arg-type]
        assert [one.rank for one in decided.decision.ranks] == [4, 16]
        assert "1 training without a result" in decided.understood
        assert "unstable" in decided.decision.flags


def test_a_status_of_failure_at_the_last_evaluation_counts_too(tmp_path: Path) -> None:
    text = "run,state,rank,step,eval_loss\n" + "".join(
        f"{run},{'crashed' if (rank, step) == (64, 200) else 'finished'},{rank},{step},{2 + 1 / rank}\n"
        for run, rank in (("a", 4), ("b", 16), ("c", 64))
        for step in (100, 200)
    )
    assert [one.rank for one in decide(write(tmp_path, text), margin=0.005).decision.ranks] == [4, 16]


def test_a_training_that_was_run_again_counts(tmp_path: Path) -> None:
    text = "run,rank,step,eval_loss\na,4,100,2.1\nb,16,200,nan\nc,16,100,2.0\nd,64,50,nan\nd,64,100,1.99\n"
    decided = decide(write(tmp_path, text), margin=0.005)
    assert [one.rank for one in decided.decision.ranks] == [4, 16, 64]
    assert "unstable" not in decided.decision.flags


def test_rows_of_the_training_loss_alone_are_no_evaluations() -> None:
    rows = [
        {"rank": rank, "step": step, "loss": 1.0, "eval_loss": 2 + 1 / rank if step % 50 == 0 else None}
        for rank in LOSSES
        for step in range(10, 120, 10)
    ]
    decided = decide(rows, margin=0.005)
    assert [one.rank for one in decided.decision.ranks] == list(LOSSES)
    assert "unstable" not in decided.decision.flags


def test_another_metric_is_that_of_the_last_evaluation_too() -> None:
    rows = [
        {"rank": rank, "step": step, "eval_loss": 2 + 1 / rank, "eval_accuracy": accuracy}
        for rank, accuracies in ((4, (0.5, 0.6)), (16, (0.6, 0.7)), (64, (0.9, math.nan)))
        for step, accuracy in reversed(list(zip((100, 200), accuracies, strict=True)))
    ]
    other = decide(rows).decision.other_metrics[0]
    assert {one.rank: one.value for one in other.ranks} == {4: 0.6, 16: 0.7}


def scored_rows(scores: Any) -> list[dict[str, Any]]:
    return [
        {"rank": rank, "item": f"q{item}", "eval_loss": scores(rank, item)} for rank in (4, 16) for item in range(80)
    ]


@pytest.mark.parametrize("missing", [math.nan, None])
def test_an_example_without_a_score_in_any_training_is_named(missing: float | None) -> None:
    decided = decide(scored_rows(lambda rank, item: missing if item == 7 else 2 + item / 80 + 1 / rank))
    assert "1 example without a score left out (q7)" in decided.understood
    assert decided.decision.basis == "items"
    decided = decide(scored_rows(lambda rank, item: 2 + item / 80 + 1 / rank))
    assert not any("without a score" in line for line in decided.understood)


def test_a_training_without_any_score_has_no_result() -> None:
    rows = [*scored_rows(lambda rank, item: 2 + item / 80 + 1 / rank)]
    rows += [{**row, "rank": 64, "eval_loss": math.nan} for row in rows[:80]]
    decided = decide(rows)
    assert [one.rank for one in decided.decision.ranks] == [4, 16]
    assert "1 training without a result" in decided.understood
    assert not any("without a score" in line for line in decided.understood)


def test_a_score_that_became_nan_is_not_the_earlier_one() -> None:
    rows = [
        {
            **row,
            "step": step,
            "eval_loss": math.nan if (row["rank"], row["item"], step) == (16, "q7", 20) else row["eval_loss"],
        }
        for row in scored_rows(lambda rank, item: 2 + item / 80 + 1 / rank)
        for step in (10, 20)
    ]
    with pytest.raises(ResultsError, match="rank 16 has no score for example q7"):
        decide(rows)


def test_another_metric_of_examples_is_not_that_of_the_last_one() -> None:
    rows = [
        row | {"eval_accuracy": float(int(row["item"][1:]) < 79)}
        for row in scored_rows(lambda rank, item: item + 1 / rank)
    ]
    assert decide(rows, metric="eval_loss").decision.other_metrics == []
    shared = [row | {"eval_accuracy": 0.5 + row["rank"] / 100} for row in rows]
    assert [one.metric for one in decide(shared, metric="eval_loss").decision.other_metrics] == ["eval_accuracy"]


@pytest.mark.parametrize("truth", [bool, np.bool_])
def test_truth_values_are_no_losses(truth: Any) -> None:
    rows = [{"rank": rank, "eval_loss": truth(rank < 5)} for rank in (1, 4, 16)]
    with pytest.raises(ResultsError, match=r"row 1: eval_loss is .*True.*, not a number"):
        decide(rows)
    with pytest.raises(ResultsError, match=r"rank .*True.* is not allowed"):
        decide([{"rank": truth(1), "eval_loss": 2.0}, {"rank": 4, "eval_loss": 2.1}])


@pytest.mark.parametrize(("name", "cell"), [("runs.csv", ";"), ("runs.tsv", "\t")])
def test_decimal_commas_are_read_where_no_comma_stands_between_cells(tmp_path: Path, name: str, cell: str) -> None:
    lines = ["rank,lr,run,state,eval_loss", "4,1e-4,a|b,finished,2|05", "16,0|0001,c,finished,2|001"]
    lines += ["64,1|0E-4,1|2,finished,2", "64,1e-3,d,crashed,NaN"]
    path = write(tmp_path, "\n".join(lines).replace(",", cell).replace("|", ",") + "\n", name)
    decision = decide(path, margin=0.005).decision
    assert {one.rank: (one.value, one.learning_rate) for one in decision.ranks} == {
        rank: (loss, 1e-4) for rank, loss in LOSSES.items()
    }


def test_rows_that_occur_twice_name_the_columns_in_which_they_differ() -> None:
    rows = [{"rank": 4, "warmup": "a", "eval_loss": 2.0}, {"rank": 4, "warmup": "b", "eval_loss": 2.1}]
    with pytest.raises(
        ResultsError, match=r"occurs twice with different values .*; they differ in warmup too; keep the rows of one"
    ):
        decide([*rows, {"rank": 16, "warmup": "a", "eval_loss": 1.9}])


def test_an_example_without_tokens_has_no_weight() -> None:
    """As `to_pandas(run, examples=True)` writes an example whose answer was cut away."""
    rows = [
        row | {"tokens": 0, "eval_loss": None} if row["item"] == "q3" else row | {"tokens": 5}
        for row in scored_rows(lambda rank, item: 2 + item / 80 + 1 / rank)
    ]
    assert "1 example without a score left out (q3)" in decide(rows).understood
