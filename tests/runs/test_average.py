"""Test `average`: the mean of several adapters' updates."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rightrank import average
from rightrank.adapters.adapter_reader import open_adapter
from rightrank.runs.average import write_average
from rightrank.schema.events import Listener
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm, Trial
from rightrank.training.loop import run_trial
from rightrank.training.trial import TrialFolders
from tests.adapters.adapters import (
    compute_deltas,
    edit_config,
    load_strictly,
    load_tensors,
    make_adapter,
    make_base,
    write_mlx,
    write_tensors,
)
from tests.commands import run
from tests.helpers import make_runtime
from tests.tiny import build_small_settings

SETTINGS = SelectSettings(seq_len=32, device="cpu")


@pytest.mark.parametrize(
    ("kinds", "precision"),
    [
        (["plain", "rslora"], 1e-6),
        (["rank_pattern", "alpha_pattern", "plain"], 1e-6),
        (["conv1d", "conv1d"], 1e-6),
        (["embedding", "embedding"], 1e-6),
        (["bfloat16", "plain"], 1e-6),  # in the finer type
        (["bfloat16", "bfloat16"], 1e-2),
    ],
)
def test_the_full_average_is_the_mean_of_the_updates(kinds: list[str], precision: float, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", kinds[0])
    members = [
        make_adapter(base, tmp_path / f"{number}", kind, rank=4 + 2 * number) for number, kind in enumerate(kinds)
    ]
    opened = [open_adapter(member) for member in members]
    written = write_average(opened, tmp_path / "mean")
    assert written.rank == max(sum(ranks) for ranks in zip(*([m.rank for m in o.modules] for o in opened), strict=True))
    assert {module.scaling for module in written.modules} == {1.0}
    deltas = [compute_deltas(load_strictly(base, folder)) for folder in (*members, tmp_path / "mean")]
    for name, mean in deltas.pop().items():
        expected = torch.stack([delta[name] for delta in deltas]).mean(0)
        assert torch.linalg.norm(mean - expected) <= precision * torch.linalg.norm(expected)


def test_an_adapter_of_mlx_is_averaged_with_one_of_peft(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    peft = [make_adapter(base, tmp_path / f"{rank}", rank=rank) for rank in (8, 4)]
    stored = [write_mlx(tmp_path / "mlx", peft[0], base), peft[1]]
    write_average([open_adapter(folder) for folder in stored], tmp_path / "mean")
    first, second, mean = (compute_deltas(load_strictly(base, folder)) for folder in (*peft, tmp_path / "mean"))
    assert all(torch.allclose(mean[name], (first[name] + second[name]) / 2, atol=1e-6) for name in mean)


@pytest.fixture(scope="module")
def members(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Train two adapters of different ranks that learned something."""
    root = tmp_path_factory.mktemp("averaged")
    runtime = make_runtime(model_folder, completion_file, build_small_settings(max_steps=30), root / "cache")
    folders = []
    for seed, rank in enumerate((2, 4)):
        arm = Arm(rank=rank, learning_rate=1e-2, lora_alpha=32.0, seed=seed, steps=30)
        folders.append(root / f"adapter{seed}")
        run_trial(runtime, Trial(trial_id="t", arm=arm), None, TrialFolders(root / "c", folders[-1]), Listener())
    return folders


@pytest.mark.parametrize(("margin", "rank"), [(9.0, 1), (1e-6, None)])
def test_the_smallest_rank_within_the_margin_of_the_best_is_written(
    margin: float, rank: int | None, members: list[Path], completion_file: Path, tmp_path: Path
) -> None:
    averaged = average(members, tmp_path / "mean", data=completion_file, margin=margin, settings=SETTINGS)
    by_id = {candidate.trial_id: candidate for candidate in averaged.candidates}
    assert set(by_id) == {*(str(member) for member in members), "r1", "r2", "r4", "r6"}
    best = min(by_id.values(), key=lambda candidate: candidate.value)
    assert by_id[averaged.reference_id].value == pytest.approx(
        min(by_id[key].value for key in (*map(str, members), "r6"))
    )
    assert averaged.rank == (rank or by_id[averaged.trial_id].rank)
    assert rank is None or averaged.trial_id == "r1"
    assert best.value <= by_id[averaged.member_id].value
    rows = len({line for line in completion_file.read_text().splitlines() if line})
    assert 0 < averaged.against_best.examples == averaged.against_member.examples < rows
    assert averaged.against_best.margin == margin
    written = open_adapter(tmp_path / "mean")
    assert written.rank >= averaged.rank
    assert averaged.sentence.count(".") > 1


def test_a_member_that_is_better_than_the_average_is_written_unchanged(
    members: list[Path], completion_file: Path, tmp_path: Path
) -> None:
    opposite = Path(shutil.copytree(members[1], tmp_path / "opposite"))
    write_tensors(opposite, {key: -v if "lora_B" in key else v for key, v in load_tensors(opposite).items()})
    pair = [opposite, members[1]]  # their mean is 0
    averaged = average(pair, tmp_path / "mean", data=completion_file, margin=0.001, settings=SETTINGS)
    assert averaged.trial_id == averaged.reference_id == averaged.member_id == str(members[1])
    assert averaged.against_member.difference == 0.0
    assert "which is written unchanged" in averaged.sentence
    tensors, written = load_tensors(members[1]), load_tensors(tmp_path / "mean")
    assert all(torch.equal(tensors[key], written[key]) for key in tensors | written)


def _name_another_base(folder: Path) -> None:
    edit_config(folder, base_model_name_or_path="another-model")
    (folder / "base.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: edit_config(folder, use_dora=True), "it uses DoRA, and only updates s·B·A can be averaged"),
        (
            lambda folder: write_tensors(
                folder, load_tensors(folder) | {"base_model.model.norm.weight": torch.ones(8)}
            ),
            "it trains base_model.model.norm.weight as well",
        ),
        (
            lambda folder: write_tensors(
                folder, {key: v for key, v in load_tensors(folder).items() if "v_proj" not in key}
            ),
            "adapt different matrices, such as model.layers.0.self_attn.v_proj",
        ),
        (_name_another_base, "it was trained on 'another-model'"),
        (shutil.rmtree, "no such folder; give an adapter folder"),
    ],
)
def test_adapters_that_have_no_average_are_refused(
    change: Callable[[Path], Any],
    words: str,
    members: list[Path],
    completion_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = Path(shutil.copytree(members[0], tmp_path / "changed"))
    change(changed)
    arguments = ["average", str(members[1]), str(changed), str(tmp_path / "out"), "--data", str(completion_file)]
    status, out, err = run([*arguments, "--json"], capsys)
    assert (status, out) == (2, "")
    assert words in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_one_adapter_or_too_few_rows_are_refused(
    members: list[Path], completion_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join(completion_file.read_text().splitlines(keepends=True)[:2]))
    names = [str(member) for member in members]
    for folders, data, words in (
        (names[:1], completion_file, "give two or more different folders"),
        (names[:1] * 2, completion_file, "give two or more different folders"),
        (names, few, "each half needs 2 or more"),
    ):
        status, _, err = run(["average", *folders, str(tmp_path / "out"), "--data", str(data)], capsys)
        assert (status, words in err.splitlines()[-1]) == (2, True), err
