"""Sweeps over alpha, scaling and initialisation: what they ask for, what they refuse, what they find."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from benchmarks.selection.tables import recommend

from rightrank.cli import main
from rightrank.models.ranks import rank_of_equal_parameters
from rightrank.report.tables import sweep_map
from rightrank.schema.decision import SweepRow
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.settings import make_settings
from rightrank.schema.trials import Arm
from rightrank.schema.variants import Variant, variants_of
from rightrank.search.history import History
from rightrank.search.strategies import strategy_named
from tests.helpers import make_runtime
from tests.search.worlds import World, make_space, run_all
from tests.tiny import small_settings

ARM = Arm(rank=16, learning_rate=1e-3, lora_alpha=32.0, seed=0, steps=100)


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("alpa=16", "did you mean 'alpha'"),
        ("dropout=0.1", "axes: alpha, scaling, init"),
        ("alpha", "AXIS=VALUE"),
        ("alpha=", "AXIS=VALUE"),
        ("alpha=16,x", "numbers above 0"),
        ("alpha=-2", "numbers above 0"),
        ("init=corda", "changes the base's weights by gradients or covariances"),
        ("init=orthogonal", "can't be shared between ranks; allowed: default, gaussian, pissa, olora, eva"),
        ("init=gausian", "did you mean 'gaussian'"),
        ("targets=q_proj+", "names joined by +"),
        ("scaling=rslora", "alpha/sqrt(r)"),
    ],
)
def test_an_invalid_sweep_is_one_clear_line(sweep: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        variants_of(make_settings({"sweep": (sweep,)}))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_settings_own_values_are_left_out() -> None:
    sweep = ("alpha=16,32,16", "init=default,gaussian", "targets=all-linear,v_proj+q_proj")
    settings = make_settings({"sweep": sweep, "lora_alpha": 32})
    labels = [variant.label for variant in variants_of(settings)]
    assert labels == ["alpha=16", "init=gaussian", "targets=q_proj+v_proj"]


def test_a_scaling_rule_is_the_alpha_of_its_scale() -> None:
    swept = Variant("scaling", "alpha/sqrt(r)").of(ARM, "alpha/r")
    assert swept.lora_alpha / 16 == pytest.approx(32 / math.sqrt(16))
    assert Variant("scaling", "constant").of(ARM, "alpha/r").lora_alpha / 16 == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["bracket", "grid"])
def test_sweeps_the_chosen_rank_and_the_reference_and_changes_no_answer(name: str) -> None:
    plain = strategy_named(name)(make_space())
    swept = strategy_named(name)(make_space(variants=(Variant("alpha", "16"),)))
    answer = recommend(plain, History.of(run_all(plain, World())))
    known = run_all(swept, World())
    assert recommend(swept, History.of(known)) == answer
    assert {outcome.rank for outcome in known if outcome.lora_alpha == 16} == {answer.rank, answer.reference_rank}
    assert all(outcome.lora_alpha == 32 for outcome in swept.evidence(History.of(known)))


def test_a_sweep_on_real_trainings(
    model_folder: Path, completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: list[Any] = ["select", model_folder, completion_file, "--out", tmp_path / "run", "--ranks", "1,4"]
    arguments += ["--learning-rates", "1e-2", "--max-steps", "8", "--batch-size", "4", "--seq-len", "32"]
    arguments += ["--eval-items", "12", "--set", "samples=0", "--strategy", "bracket", "--json", "--quiet"]
    arguments += ["--sweep", "alpha=8", "--sweep", "init=gaussian,pissa,eva", "--sweep", "targets=q_proj+v_proj"]
    arguments += ["--sweep", "equal_targets=down_proj+up_proj"]
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    inits = {"init=gaussian", "init=pissa", "init=eva"}
    sets = {"targets=q_proj+v_proj", "equal_targets=down_proj+up_proj"}
    assert {row["setting"] for row in answer["sweep"]} == {"alpha=8", *inits, *sets}
    for row in answer["sweep"]:
        factor = {"init=pissa": 2.0, "targets=q_proj+v_proj": 0.25}.get(row["setting"], 1.0)
        assert row["parameters"] == pytest.approx(factor * row["shared_parameters"], rel=0.2), row["setting"]
    assert (tmp_path / "run" / "figures" / "sweep.svg").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Other settings, each at its best learning rate" in page
    assert "init=gaussian" in page
    values = {row["rank"]: row["value"] for row in answer["ranks"]}
    for row in answer["sweep"]:
        assert row["gain"] == pytest.approx(values[row["rank"]] - row["value"], abs=1e-6)
        assert row["gain"] != 0


def test_fewer_modules_at_as_many_parameters() -> None:
    assert rank_of_equal_parameters(16, [(8, 8), (8, 8), (24, 8)], [(8, 8)]) == 64
    assert rank_of_equal_parameters(3, [(10, 10)], [(10, 14)]) == 2  # 60 parameters: 48 are nearer than 72
    assert rank_of_equal_parameters(1, [(8, 8)], [(64, 64)]) == 1
    arm = Variant("equal_targets", "q_proj+v_proj").of(ARM, "alpha/r")
    assert (arm.rank, arm.target_modules, arm.equal_parameters) == (16, ("q_proj", "v_proj"), True)
    assert arm != Variant("targets", "q_proj+v_proj").of(ARM, "alpha/r")


def test_a_set_that_cannot_hold_as_many_parameters_is_refused(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    settings = small_settings(ranks=(1, 16), sweep=("equal_targets=k_proj",))
    with pytest.raises(ModelError, match="as many parameters as rank 16 has over all-linear take rank"):
        make_runtime(model_folder, completion_file, settings, tmp_path)


def test_a_sweep_is_drawn_rank_by_setting() -> None:
    rows = [
        SweepRow(setting="alpha=16", rank=4, learning_rate=3e-3, value=1.2, gain=-0.1),
        SweepRow(setting="alpha=16", rank=64, learning_rate=1e-3, value=0.9, gain=0.1),
        SweepRow(setting="init=gaussian", rank=64, learning_rate=1e-3, value=1.05, gain=-0.05),
    ]
    drawn = sweep_map(rows, "loss", higher_is_better=False)
    assert drawn is not None
    assert drawn.column_names == ("shared by all ranks", "alpha=16", "init=gaussian")
    assert drawn.values[0] == (pytest.approx(1.1), 1.2, None)
    assert drawn.values[1] == (pytest.approx(1.0), 0.9, 1.05)
    assert drawn.best == (0, 1)
    assert "rank 4: shared by all ranks, rank 64: alpha=16" in drawn.alt
    assert sweep_map([], "loss", higher_is_better=False) is None
