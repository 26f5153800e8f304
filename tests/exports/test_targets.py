"""Test exports of a small run: the content of each target, which requests are refused, and that files work from their own folder."""

from __future__ import annotations

import ast
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM

from rightrank import Selected, export, inspect, select_rank, write_report
from rightrank.adapters.adapter_reader import open_adapter
from rightrank.adapters.rank_math import SERVER_RANKS, find_server_rank
from rightrank.cli import cli
from rightrank.decision.records import read_records
from rightrank.exports.exports import TARGETS, write_export
from rightrank.exports.recipe import Recipe, build_recipe
from rightrank.report.answer import build_answer_view
from rightrank.report.html import render_model_card
from rightrank.runs.folder import RunFolder
from rightrank.schema.errors import ResultsError, RunFolderError, SettingsError
from rightrank.schema.events import RunStarted
from rightrank.schema.trials import TrialFinished
from tests.commands import read_journal_records, run_forked
from tests.tiny import build_small_settings

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def selected(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Selected:
    """Select among two ranks on the last two layers, with the scale alpha/sqrt(r)."""
    settings = build_small_settings(layers_to_transform=(1, 2), scaling="alpha/sqrt(r)", max_steps=4, num_evaluations=1)
    return select_rank(str(model_folder), completion_file, tmp_path_factory.mktemp("run") / "run", settings=settings)


@pytest.fixture(scope="module")
def recipe(selected: Selected) -> Recipe:
    journal = RunFolder(selected.run).journal.read()
    started = next(record for record in journal if isinstance(record, RunStarted))
    finished = [record for record in journal if isinstance(record, TrialFinished)]
    chosen = selected.answers.adapter.answer.trial_id
    trial = next(record for record in finished if record.trial_id == chosen)
    return build_recipe(started, trial, selected.adapter.path, finished)


@pytest.fixture(scope="module")
def truncated(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Selected:
    """Select with the goal adapter: rank 4 is trained, and the margin is so large that rank 1 is handed over."""
    settings = build_small_settings(
        strategy="bracket", goal="adapter", margin=5.0, max_steps=20, num_evaluations=1, scaling="alpha/sqrt(r)"
    )
    return select_rank(str(model_folder), completion_file, tmp_path_factory.mktemp("run") / "run", settings=settings)


def write_target(selected: Selected, target: str) -> Path:
    return export(selected.run, target).folder


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_contains_the_rank(selected: Selected, target: str) -> None:
    exported = export(selected.run, target)
    assert exported.folder == selected.run / "exports" / target
    text = "".join(
        path.read_text(encoding="utf-8")
        for path in exported.folder.iterdir()
        if path.suffix in (".py", ".yaml", ".sh", ".json")
    )
    handed_over = selected.exported_adapter
    ranks = {"vllm": find_server_rank(handed_over.rank), "peft": handed_over.rank}
    ranks["sglang"] = handed_over.max_module_rank
    assert str(ranks.get(target, handed_over.trained_rank)) in text
    assert exported.command
    assert exported.files == sorted(path.name for path in exported.folder.iterdir())


def test_status_and_export_import_no_torch(selected: Selected, tmp_path: Path) -> None:
    code = (
        "import sys; from rightrank.api.folders import export, status; run, out = sys.argv[1:]\n"
        "status(run); export(run, 'vllm', out + '/vllm'); export(run, 'peft', out + '/peft')\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, selected.run, tmp_path], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_peft_s_config_makes_the_same_adapter_again(selected: Selected, model_folder: Path) -> None:

    folder = write_target(selected, "peft")
    names: dict[str, Any] = {}
    exec((folder / "lora_config.py").read_text(encoding="utf-8"), names)
    loaded = AutoPeftModelForCausalLM.from_pretrained(str(folder))
    base: Any = AutoModelForCausalLM.from_pretrained(str(model_folder))
    recreated = get_peft_model(base, names["lora_config"])
    shapes = [
        {name: tuple(value.shape) for name, value in model.state_dict().items() if "lora_" in name}
        for model in (loaded, recreated)
    ]
    assert shapes[0]
    assert shapes[0] == shapes[1]
    scales = [
        {name: module.scaling["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
        for model in (loaded, recreated)
    ]
    assert scales[0] == scales[1]


def test_layers_are_kept_for_trainers_without_an_option_for_them(selected: Selected) -> None:
    values = yaml.safe_load((write_target(selected, "trl") / "trl_sft.yaml").read_text())
    assert {name.split(".")[2] for name in values["lora_target_modules"]} == {"1", "2"}
    values = yaml.safe_load((write_target(selected, "axolotl") / "axolotl.yaml").read_text())
    assert values["peft_layers_to_transform"] == [1, 2]
    assert values["peft_use_rslora"] is True


def test_llamafactory_finds_its_data_set(selected: Selected, completion_file: Path) -> None:
    folder = write_target(selected, "llamafactory")
    values = yaml.safe_load((folder / "llamafactory.yaml").read_text())
    entry = json.loads((folder / "dataset_info.json").read_text())[values["dataset"]]
    assert entry == {"file_name": str(completion_file), "columns": {"prompt": "prompt", "response": "completion"}}


def test_names_with_spaces_and_quotes_stay_one_word(recipe: Recipe) -> None:
    nasty = "a b'; rm -rf $HOME"
    script = TARGETS["vllm"](replace(recipe, model=nasty)).files["vllm.sh"]
    assert nasty in shlex.split(script.splitlines()[1])


@pytest.mark.parametrize("target", ["peft", "unsloth"])
def test_snippets_are_python_whatever_the_names(recipe: Recipe, target: str) -> None:
    for text in TARGETS[target](replace(recipe, model='it\'s "a" \\ model\n')).files.values():
        ast.parse(text)


def test_the_printed_line_can_be_pasted_and_stands_alone_on_stdout(selected: Selected, tmp_path: Path) -> None:
    run = tmp_path / "my run; $(x)"
    shutil.copytree(selected.run, run)
    shown = CliRunner().invoke(cli, ["export", str(run), "--to", "trl"])
    assert shlex.split(shown.stdout)[:4] == ["cd", str(run / "exports" / "trl"), "&&", "trl"]
    assert "note: " in shown.stderr


def test_what_a_target_cannot_express_is_a_note(recipe: Recipe) -> None:
    patterned = replace(recipe, rank_pattern={"q_proj": 8})
    assert TARGETS["trl"](patterned).notes == [
        "TRL's command line has no rank_pattern; the file has one rank for all modules"
    ]
    assert yaml.safe_load(TARGETS["axolotl"](patterned).files["axolotl.yaml"])["lora_rank_pattern"] == {"q_proj": 8}
    with_head = replace(recipe, modules_to_save=("score",), task_type="SEQ_CLS")
    assert len(TARGETS["vllm"](with_head).notes) == len(TARGETS["vllm"](recipe).notes) + 2


def test_vllm_serves_the_next_rank_that_it_has(recipe: Recipe) -> None:
    for rank in range(1, 513):
        words = TARGETS["vllm"](replace(recipe, r=rank)).files["vllm.sh"].split()
        served = int(words[words.index("--max-lora-rank") + 1])
        assert served in SERVER_RANKS
        assert served >= rank
        assert not [smaller_rank for smaller_rank in SERVER_RANKS if rank <= smaller_rank < served]
    with pytest.raises(ResultsError, match="vLLM supports ranks up to 512, and this adapter has 513"):
        TARGETS["vllm"](replace(recipe, r=513))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, as TRL builds its arguments
def test_trl_s_own_parser_reads_it(selected: Selected) -> None:
    trl_module: Any = pytest.importorskip("trl", reason="trl is not installed")
    from trl.scripts.utils import DatasetMixtureConfig

    parser = trl_module.TrlParser(
        (trl_module.ScriptArguments, trl_module.SFTConfig, trl_module.ModelConfig, DatasetMixtureConfig)
    )
    file = write_target(selected, "trl") / "trl_sft.yaml"
    _, _, model, _ = parser.parse_args_and_config(["--config", str(file), "--use_cpu", "true"])
    assert trl_module.get_peft_config(model).r == selected.exported_adapter.trained_rank


def test_another_rank_is_exported_by_its_own_training(selected: Selected, truncated: Selected, tmp_path: Path) -> None:
    """Export a training at the rank for a trainer, and the run's adapter for a server. The error for other ranks lists the trained ones."""
    trials = read_journal_records(selected.run, TrialFinished)
    for rank in {trial.rank for trial in trials if trial.rank and trial.arm.is_direct}:
        folder = export(selected.run, "trl", tmp_path / f"trl{rank}", rank=rank).folder
        assert yaml.safe_load((folder / "trl_sft.yaml").read_text())["lora_r"] == rank
        folder = export(selected.run, "peft", tmp_path / f"peft{rank}", rank=rank).folder
        assert open_adapter(folder).config["r"] == rank
    assert (truncated.exported_adapter.rank, truncated.exported_adapter.trained_rank) == (1, 4)
    with pytest.raises(ResultsError, match="the run has no training at rank 1; give one of 4, or leave rank out"):
        export(truncated.run, "trl", rank=1)
    with pytest.raises(ResultsError, match="the run has no adapter of rank 3; give one of 1, 2, 4, or leave rank out"):
        export(truncated.run, "sglang", rank=3)
    recipe = yaml.safe_load((write_target(truncated, "trl") / "trl_sft.yaml").read_text())
    assert recipe["lora_r"] == 4  # the recipe of the adapter that is handed over


@pytest.mark.parametrize(
    ("handed_over", "trained", "text"),
    [
        ({"method": "truncated", "rank": 2, "min_module_rank": 1, "max_module_rank": 4}, 4,
         "To train again, start at rank 16 and truncate, or train at rank 4."),
        ({"method": "truncated", "rank": 8, "min_module_rank": 8, "max_module_rank": 8}, None,
         "To train again, start at rank 16 and truncate."),
        ({"method": "trained", "rank": 16, "min_module_rank": 16, "max_module_rank": 16}, 16,
         "To train again, train at rank 16."),
    ],
)  # fmt: skip
def test_a_note_names_each_way_to_train_again(
    selected: Selected, handed_over: dict[str, Any], trained: int | None, text: str
) -> None:
    recorded = selected.answers.adapter
    exported = recorded.handed_over.model_copy(update=handed_over | {"trained_rank": 16})
    answers = replace(
        selected.answers,
        adapter=recorded.model_copy(update={"handed_over": exported}),
        decision=selected.decision_or_none.model_copy(update={"rank": trained}),
    )
    assert text in build_answer_view(answers).adapter_notes


def test_with_goal_adapter_servers_get_the_small_adapter(truncated: Selected) -> None:

    assert truncated.decision_or_none is None
    assert (truncated.exported_adapter.rank, truncated.exported_adapter.method) == (1, "truncated")
    folder = write_target(truncated, "peft")
    assert AutoPeftModelForCausalLM.from_pretrained(str(folder)).peft_config["default"].r == 1
    script = (write_target(truncated, "vllm") / "vllm.sh").read_text(encoding="utf-8")
    words = shlex.split(script, comments=True)
    assert words[words.index("--max-lora-rank") + 1] == str(
        find_server_rank(truncated.exported_adapter.max_module_rank)
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, as TRL builds its arguments
def test_trainers_get_the_training_that_a_smaller_adapter_comes_from(truncated: Selected) -> None:
    values = yaml.safe_load((write_target(truncated, "axolotl") / "axolotl.yaml").read_text())
    assert (values["lora_r"], values["lora_alpha"], values["max_steps"]) == (4, 32, 20)
    assert values["learning_rate"] == 1e-2
    values = yaml.safe_load((write_target(truncated, "trl") / "trl_sft.yaml").read_text())
    assert (values["lora_r"], values["use_rslora"], values["max_steps"]) == (4, True, 20)


@pytest.mark.parametrize("target", TARGETS)
def test_files_say_how_to_make_a_smaller_adapter_again(truncated: Selected, completion_file: Path, target: str) -> None:
    exported = export(truncated.run, target)
    assert any(
        note.startswith("The adapter of rank 1 was trained at rank 4 (learning rate 0.01") for note in exported.notes
    )
    files = [path for path in exported.folder.iterdir() if path.suffix in (".py", ".yaml", ".sh")]
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        command = next(line for line in lines if "rightrank resize" in line).partition("then: ")[2]
        words = shlex.split(command)
        assert words[:4] == ["rightrank", "resize", "TRAINED", "SMALLER"]
        options = dict(zip(words[4::2], words[5::2], strict=True))
        assert (options["--ranks"], options["--data"]) == ("1", str(completion_file))
        if path.suffix == ".sh":
            subprocess.run(["sh", "-n", str(path)], check=True)
    assert files


def test_a_trained_adapter_has_no_such_line(recipe: Recipe, tmp_path: Path) -> None:
    provenance = replace(recipe.provenance, rank=recipe.r, trained_rank=recipe.r, truncation=None)
    trained = replace(recipe, provenance=provenance)
    assert trained.format_rebuild_comments() == []
    assert trained.build_training_recipe() == trained


def test_a_name_with_a_line_break_stays_in_its_comment(recipe: Recipe, tmp_path: Path) -> None:
    provenance = replace(recipe.provenance, rank=1, trained_rank=4, truncation="K-FAC")
    exported = write_export("trl", replace(recipe, provenance=provenance, data="a\nevil: 1\u2028b"), tmp_path / "out")
    assert "evil" not in yaml.safe_load((exported.folder / "trl_sft.yaml").read_text(encoding="utf-8"))


def test_an_unknown_target_is_answered_with_the_targets(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"unknown export target 'vlm' \(did you mean 'vllm'.*allowed: peft, trl"):
        export(tmp_path, "vlm")


def test_a_folder_without_a_run_or_an_adapter_is_refused(selected: Selected, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no journal\.jsonl there"):
        export(tmp_path, "peft")
    with pytest.raises(RunFolderError, match=r"no journal\.jsonl there"):
        write_report(tmp_path / "nowhere")
    lines = (selected.run / "journal.jsonl").read_text().splitlines(keepends=True)
    answered = ('"type":"decided"', '"type":"adapter_recorded"')
    unfinished = [line for line in lines if not any(name in line for name in answered)]
    (tmp_path / "journal.jsonl").write_text("".join(unfinished))
    with pytest.raises(RunFolderError, match="no adapter yet"):
        export(tmp_path, "peft")


def test_the_report_shows_the_adapter_s_spectrum(selected: Selected) -> None:
    rows = list(csv.DictReader((selected.run / "figures" / "spectrum.csv").read_text().splitlines()))
    inspection = inspect(selected.adapter.path)
    assert len(rows) == selected.adapter.rank
    largest = max(module.singular_values[0] for module in inspection.modules)
    assert float(rows[0]["largest"]) == pytest.approx(largest)


def test_the_report_is_written_again_from_the_journal_and_the_adapter(selected: Selected, tmp_path: Path) -> None:
    shutil.copytree(selected.adapter.path, tmp_path / "adapter")
    (tmp_path / "journal.jsonl").write_bytes((selected.run / "journal.jsonl").read_bytes())
    first = selected.report.read_text(encoding="utf-8").replace(str(selected.run), str(tmp_path))
    assert write_report(tmp_path).read_text(encoding="utf-8") == first
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        path.name for path in (selected.run / "figures").iterdir()
    }


@pytest.mark.parametrize("target", ["peft", "trl"])
@pytest.mark.parametrize("path_name", ["file", "folder", "link", "run", ""])
def test_existing_paths_are_not_overwritten(
    selected: Selected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, path_name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("folder").mkdir()
    Path("link").symlink_to("nowhere")
    initial_names = sorted(path.name for path in selected.run.iterdir())
    out = selected.run if path_name == "run" else Path(path_name)
    with pytest.raises(RunFolderError, match="this path already exists; give a new folder"):
        export(selected.run, target, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert Path("file").read_text() == "mine"
    assert sorted(path.name for path in selected.run.iterdir()) == initial_names


def test_a_new_folder_is_made_with_its_parents(selected: Selected, tmp_path: Path) -> None:
    exported = export(selected.run, "peft", tmp_path / "a" / "b")
    assert (exported.folder / "adapter_config.json").exists()


def test_the_card_names_a_base_of_the_hub(selected: Selected) -> None:
    """Name a base on the hub, because the hub rejects a card whose base is a folder."""
    file = selected.adapter.path / "README.md"
    values = ModelCard.load(file).data.to_dict()  # the hub's own reader
    assert (values["library_name"], "base_model" in values) == ("peft", False)
    records = read_records(RunFolder(selected.run).journal.read(), "the run")
    settings = records.started.settings | {"model": "someone/a-model"}
    records.started = records.started.model_copy(update={"settings": settings})
    card = ModelCard(render_model_card(records, selected.decision_or_none))
    assert card.data.to_dict()["base_model"] == "someone/a-model"


def test_the_plot_goes_where_the_card_goes(selected: Selected) -> None:
    folder = export(selected.run, "peft").folder
    assert "](rank_curve.svg)" in (folder / "README.md").read_text(encoding="utf-8")
    assert (folder / "rank_curve.svg").read_bytes() == (selected.run / "figures" / "rank_curve.svg").read_bytes()
    assert (folder / "rank_curve.svg").read_bytes().startswith(b"<svg")


@pytest.fixture(scope="module")
def home(model_folder: Path, completion_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a run whose model and data were given as relative paths."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "model").symlink_to(model_folder)
    (folder / "data.jsonl").symlink_to(completion_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings = build_small_settings(max_steps=2, goal="adapter", target_modules=("q_proj", "v_proj"))
        select_rank("./model", "data.jsonl", "run", settings=settings)
        for target in TARGETS:
            export("run", target)
    return folder


@pytest.fixture(scope="module")
def home_recipe(home: Path) -> Recipe:
    journal = RunFolder(home / "run").journal.read()
    started = next(record for record in journal if isinstance(record, RunStarted))
    finished = [record for record in journal if isinstance(record, TrialFinished)]
    return build_recipe(started, finished[-1], home / "run" / "adapter", finished)


def test_no_file_names_a_place_relative_to_where_the_selection_ran(home: Path) -> None:
    model, data = (home / "model").resolve(), (home / "data.jsonl").resolve()
    for target in TARGETS:
        folder = home / "run" / "exports" / target
        text = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".py", ".yaml", ".sh", ".json"))
        assert "./model" not in text
        assert str(model) in text
        assert '"data.jsonl"' not in text.replace(str(data), "")


def test_an_export_from_another_folder_names_the_same_places(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = export(home / "run", "trl", tmp_path / "elsewhere")
    settings = yaml.safe_load((result.folder / "trl_sft.yaml").read_text())
    assert settings["model_name_or_path"] == str((home / "model").resolve())
    assert settings["datasets"][0]["data_files"] == str((home / "data.jsonl").resolve())


def run_trl_sft(folder: Path) -> None:
    """Run `trl sft --config trl_sft.yaml` in this process, with TRL's own parser and script."""
    warnings.simplefilter("ignore")
    os.chdir(folder)
    sys.argv = ["sft", "--config", "trl_sft.yaml", "--max_steps", "1", "--report_to", "none", "--use_cpu", "true"]
    from trl.scripts.sft import main, make_parser

    main(*make_parser().parse_args_and_config(return_remaining_strings=True)[:4])


def test_trl_runs_from_the_exported_folder(home: Path, tmp_path: Path) -> None:
    folder = home / "run" / "exports" / "trl"
    status, err = run_forked(partial(run_trl_sft, folder), tmp_path / "log").end()
    assert status == 0, err[-3000:]
    config = json.loads((folder / "trl-output" / "adapter_config.json").read_text())
    assert config["r"] == yaml.safe_load((folder / "trl_sft.yaml").read_text())["lora_r"]


def test_unsloth_gets_bare_names(home_recipe: Recipe, tmp_path: Path) -> None:
    full_name_recipe = replace(
        home_recipe, target_modules=("model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj")
    )
    write_export("unsloth", full_name_recipe, tmp_path / "out")
    assert "target_modules=['q_proj']" in (tmp_path / "out" / "unsloth_lora.py").read_text()


@pytest.mark.parametrize("shape", ["alpaca", "sharegpt", "ask → prompt, reply → completion"])
def test_trainers_read_the_columns_that_the_file_has(home_recipe: Recipe, shape: str) -> None:
    renamed = {"prompt": "ask, then → wait", "completion": "reply"} if "→" in shape else {}
    renamed_recipe = replace(home_recipe, shape=shape, columns=renamed)
    dataset = yaml.safe_load(TARGETS["axolotl"](renamed_recipe).files["axolotl.yaml"])["datasets"][0]
    entry = json.loads(TARGETS["llamafactory"](renamed_recipe).files["dataset_info.json"])["rightrank_data"]
    if shape == "alpaca":
        assert dataset["type"] == "alpaca"
        assert entry["columns"]["query"] == "input"
    elif shape == "sharegpt":
        assert dataset["field_messages"] == entry["columns"]["messages"] == "conversations"
    else:
        assert dataset["type"]["field_instruction"] == entry["columns"]["prompt"] == "ask, then → wait"
    assert any(shape in note for note in TARGETS["trl"](renamed_recipe).notes)
