"""Initial values other than PEFT's default: `orthogonal`, and `pissa` and `olora`, which PEFT computes from the base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file

from rightrank import export, inspect, select_rank
from rightrank.adapters.kinds.base import InitialDraw, Routing
from rightrank.schema.errors import InterruptedRun, ModelError, SettingsError
from rightrank.schema.events import Listener, StepDone
from rightrank.schema.trials import Arm, Trial, TrialFinished
from rightrank.training.loop import run_trial
from rightrank.training.multi_lora import ADAPTER, MultiLora, find_lora_modules
from rightrank.training.runtime import Runtime, attach_adapter
from rightrank.training.targets import suppress_peft_warnings
from rightrank.training.trial import TrialFolders
from tests.adapters.kind_checks import compute_peft_updates, train_plain_loop
from tests.helpers import make_runtime
from tests.tiny import build_small_settings, make_tokenizer
from tests.training.architectures import make_model, make_model_runtime, run
from tests.watch import Watch

STEPS = 5
ARM = Arm(rank=4, learning_rate=1e-2, lora_alpha=8.0, seed=0, steps=STEPS)


def train_with_peft(runtime: Runtime, folder: Path, init: str) -> tuple[list[float], Path]:
    """Train with PEFT alone; return the losses, and the adapter that PEFT converts to plain LoRA."""
    settings = runtime.settings
    config = LoraConfig(
        r=ARM.rank, lora_alpha=8, init_lora_weights=init, use_rslora=settings.scaling == "alpha/sqrt(r)",  # type: ignore[arg-type]
        target_modules=list(runtime.targets.names), task_type="CAUSAL_LM",
    )  # fmt: skip
    with suppress_peft_warnings():
        model: Any = get_peft_model(copy.deepcopy(runtime.model), config).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(folder / "start"))
    model.peft_config["default"].init_lora_weights = init
    losses = train_plain_loop(runtime, ARM, model)
    out = folder / "converted"
    model.save_pretrained(str(out), path_initial_model_for_weight_conversion=str(folder / "start"))
    return losses, out


@pytest.mark.filterwarnings("ignore:OLoRA changes the base weights", "ignore:PiSSA changes the base weights")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize(("name", "init"), [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa")])
def test_losses_and_adapter_are_pefts(
    completion_file: Path, tmp_path: Path, name: str, init: str, scaling: str
) -> None:
    """Compare with the adapter that PEFT saves with `path_initial_model_for_weight_conversion`: a plain LoRA of rank 2r."""
    tokenizer = make_tokenizer()
    model = make_model(name, len(tokenizer))
    runtime = make_model_runtime(
        model, tokenizer, completion_file, tmp_path / "cache", init_lora_weights=init, scaling=scaling
    )
    runtime.steps = STEPS
    original_state = {key: value.clone() for key, value in runtime.model.state_dict().items()}
    (ours,) = run(runtime, [ARM], tmp_path / "ours", 1)
    assert all(torch.equal(value, original_state[key]) for key, value in runtime.model.state_dict().items())
    losses, theirs = train_with_peft(runtime, tmp_path, init)
    assert ours.train_losses == pytest.approx(losses, rel=5e-6)
    folder = tmp_path / "ours" / "t0"
    mine, peft_tensors = (load_file(folder_path / "adapter_model.safetensors") for folder_path in (folder, theirs))
    assert mine.keys() == peft_tensors.keys()
    assert all(torch.allclose(mine[key], peft_tensors[key], atol=2e-5) for key in mine)
    configs = [json.loads((folder_path / "adapter_config.json").read_text()) for folder_path in (folder, theirs)]
    named = {"base_model_name_or_path": configs[0]["base_model_name_or_path"]}
    assert {key: configs[0][key] for key in configs[1]} == configs[1] | named
    assert (configs[0]["r"], configs[0]["init_lora_weights"]) == (2 * ARM.rank, True)
    assert ours.trainable_parameters * 2 == sum(value.numel() for value in mine.values())


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_ranks_share_a_pass_and_each_starts_from_the_base(completion_file: Path, tmp_path: Path, init: str) -> None:
    tokenizer = make_tokenizer()
    model = make_model("llama", len(tokenizer))
    runtime = make_model_runtime(
        model, tokenizer, completion_file, tmp_path / "cache", init_lora_weights=init, ranks=(2, 4)
    )
    arms = [ARM.model_copy(update={"rank": rank, "steps": 3}) for rank in (2, 4)]
    alone = [run(runtime, [arm], tmp_path / str(arm.rank), 1)[0] for arm in arms]
    shared_trials = run(runtime, arms, tmp_path / "both", 2)
    assert [trial.adapters_per_pass for trial in shared_trials] == [2, 2]
    for trial, reference in zip(shared_trials, alone, strict=True):
        assert trial.train_losses == pytest.approx(reference.train_losses, rel=1e-5)
    batch = runtime.make_batch("train", runtime.plan_batches(0)[0])
    base = runtime.compute_losses("train", batch, 1.0)
    mean = float(base.example_losses.sum() / base.example_tokens.sum())
    assert [trial.train_losses[0] for trial in alone] == pytest.approx([mean, mean], rel=1e-5)


def test_dropout_leaves_what_was_taken_from_the_base_alone(completion_file: Path, tmp_path: Path) -> None:
    """Check that dropout applies to the inputs of A and B, as in PEFT, and not to the base's."""
    tokenizer = make_tokenizer()
    model = make_model("llama", len(tokenizer))
    changes = {"init_lora_weights": "pissa", "lora_dropout": 0.5, "layers_to_transform": (1,)}
    runtime = make_model_runtime(
        model, tokenizer, completion_file, tmp_path / "cache", target_modules=("v_proj",), **changes
    )
    with MultiLora(runtime.model, runtime.settings) as multi_lora, torch.no_grad():
        multi_lora.add(ADAPTER, ARM, runtime.make_config(ARM))
        (layer,) = find_lora_modules(multi_lora.peft_model).values()
        a, b, scale = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.scaling[ADAPTER]
        x = torch.randn(1, 3, layer.in_features)
        multi_lora.routing = Routing.from_packed([ADAPTER], [7], [3])
        dropped = layer(x) - (x @ layer.base_layer.weight.T - scale * x @ a.T @ b.T)
        kept_inputs = torch.linalg.lstsq((scale * b @ a), dropped[0].T).solution.T  # the inputs that A saw
        assert torch.allclose(scale * kept_inputs @ a.T @ b.T, dropped[0], atol=1e-5)
        assert not torch.allclose(kept_inputs @ a.T, x[0] @ a.T, atol=1e-2)


def test_orthogonal_is_pefts_and_ranks_share_a_draw() -> None:
    """Check B·A = 0, entries as in PEFT (A: 0.1 / √2), and that a higher rank contains the rows of a lower one."""
    draw = InitialDraw(3, "model.layers.0.q_proj", "orthogonal")
    for rank in (2, 8, 32):
        a, b = draw.draw_orthogonal(rank, 400, 300)
        assert (tuple(a.shape), tuple(b.shape)) == ((rank, 400), (300, rank))
        assert float((b @ a).abs().max()) < 1e-12
        peft_model = get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(400, 300)),  # type: ignore[arg-type]
            LoraConfig(r=rank, init_lora_weights="orthogonal", target_modules=["0"]),
        ).base_model.model[0]
        for mine, theirs in ((a, peft_model.lora_A["default"].weight), (b, peft_model.lora_B["default"].weight)):
            assert float(mine.norm()) == pytest.approx(float(theirs.detach().norm()), rel=0.15)
    low, high = draw.draw_orthogonal(4, 400, 300)[0], draw.draw_orthogonal(16, 400, 300)[0]
    assert float((low - low @ torch.linalg.pinv(high) @ high).abs().max()) < 1e-10
    second_draw = InitialDraw(3, "model.layers.1.q_proj", "orthogonal").draw_orthogonal(4, 400, 300)[0]
    assert not torch.allclose(low, second_draw)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_lora_weights": "pissa", "use_dora": True}, r"init_lora_weights pissa: .*q_proj is DoRA, and PEFT supports this initialization for"),
        ({"init_lora_weights": "olora", "target_modules": ("embed_tokens", "q_proj")}, "is an embedding, and PEFT supports this initialization"),
        ({"init_lora_weights": "orthogonal", "target_modules": ("embed_tokens",)}, "is an embedding, and PEFT supports this initialization"),
        ({"init_lora_weights": "orthogonal", "ranks": (2, 3)}, "only even ranks, got rank 3; give even ranks"),
    ],
)  # fmt: skip
def test_what_peft_does_not_start_so_is_refused_before_the_first_step(
    model_folder: Path, completion_file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ModelError, SettingsError), match=message):
        select_rank(
            str(model_folder),
            completion_file,
            tmp_path / "run",
            settings=build_small_settings(**{"ranks": (2, 4)} | changes),
        )


def test_olora_on_a_conv1d_is_refused(completion_file: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ModelError, match=r"is a Conv1D, whose matrix PEFT's OLoRA would transpose; leave it out"):
        make_model_runtime(
            make_model("gpt2", len(tokenizer)), tokenizer, completion_file, tmp_path, init_lora_weights="olora"
        )


def test_the_plan_counts_what_is_kept_beside_the_adapters(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    from rightrank.planning.estimate import Estimator
    from rightrank.planning.planner import build_step_settings

    settings = build_small_settings(init_lora_weights="pissa", max_steps=STEPS)
    runtime = make_runtime(model_folder, completion_file, settings, tmp_path / "cache")
    (ours,) = run(runtime, [ARM], tmp_path / "ours", 1)
    plain = settings.model_copy(update={"init_lora_weights": "default"})
    planned, without = (
        Estimator(runtime.model.config, build_step_settings(runtime.model.config, planned_settings, 32, "cpu", None))
        for planned_settings in (settings, plain)
    )
    inventory, plain_inventory = planned.get_inventory(ARM.rank), without.get_inventory(ARM.rank)
    assert inventory.trainable_parameters == ours.trainable_parameters == plain_inventory.trainable_parameters
    assert inventory.adapter_bytes == (tmp_path / "ours" / "t0" / "adapter_model.safetensors").stat().st_size
    extra_bytes = planned.estimate(ARM.rank).peak_bytes - without.estimate(ARM.rank).peak_bytes
    assert 4 * ours.trainable_parameters <= extra_bytes <= 5 * 4 * ours.trainable_parameters


def test_a_selection_says_at_which_rank_its_adapter_loads(
    model_folder: Path, completion_file: Path, tmp_path: Path
) -> None:
    settings = build_small_settings(init_lora_weights="pissa", ranks=(1, 2), max_steps=4, num_evaluations=1)
    steps: list[StepDone] = []
    stopping = Watch(
        on_event=lambda event: steps.append(event) if isinstance(event, StepDone) else None,
        should_stop=lambda: len(steps) == 2,
    )
    with pytest.raises(InterruptedRun):
        select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings, callbacks=[stopping])
    selected = select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings)
    selection = select_rank(str(model_folder), completion_file, tmp_path / "whole", settings=settings)
    assert [rank.value for rank in selected.decision.ranks] == [rank.value for rank in selection.decision.ranks]
    assert selected.adapter.path is not None
    rank = selected.exported_adapter.rank
    assert (selected.exported_adapter.method, selected.exported_adapter.load_rank) == ("trained", 2 * rank)
    model = AutoPeftModelForCausalLM.from_pretrained(str(selected.adapter.path))
    assert model.peft_config["default"].r == 2 * rank
    card = (selected.adapter.path / "README.md").read_text(encoding="utf-8")
    assert f"# LoRA adapter of rank {2 * rank}, trained at rank {rank}" in card
    assert (
        "**Note:** init_lora_weights pissa: an adapter that is trained at rank r loads on the base as a plain" in card
    )
    sentence = f"It loads as rank {2 * rank}."
    assert sentence in selected.report.read_text(encoding="utf-8")
    again = export(selected.run, "peft", tmp_path / "peft")
    assert again.files
    assert {module.rank for module in inspect(tmp_path / "peft").modules} == {2 * rank}
    export(selected.run, "axolotl", tmp_path / "axolotl")
    written = (tmp_path / "axolotl" / "axolotl.yaml").read_text(encoding="utf-8")
    assert f"lora_r: {rank}\n" in written
    assert "peft_init_lora_weights: pissa\n" in written


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_truncation_is_one_of_the_whole_update(completion_file: Path, tmp_path: Path, init: str) -> None:
    """Check the best approximation of s·(B·A - B0·A0) at the rank of each module; PEFT loads the adapter that was measured."""
    tokenizer = make_tokenizer()
    model = make_model("llama", len(tokenizer))
    runtime = make_model_runtime(model, tokenizer, completion_file, tmp_path / "cache", init_lora_weights=init)
    run(runtime, [ARM], tmp_path, 1)
    arm = ARM.model_copy(update={"rank": 2, "steps": 0, "truncate_from": "t0"})
    folders = TrialFolders(tmp_path / "cut.ckpt", tmp_path / "cut", None, tmp_path / "t0", None)
    outcome = run_trial(runtime, Trial(trial_id="cut", arm=arm), None, folders, Listener())
    assert isinstance(outcome, TrialFinished)
    updates = []
    for name in ("t0", "cut"):
        with attach_adapter(runtime, tmp_path / name) as loaded:
            updates.append({key: value.clone() for key, value in compute_peft_updates(loaded).items()})
            losses = runtime.evaluate("validation").losses
    assert losses == pytest.approx(outcome.example_losses, rel=1e-5)
    ranks = {module.name: module.rank for module in inspect(tmp_path / "cut").modules}
    for name, update in updates[0].items():
        u, values, v = torch.linalg.svd(update, full_matrices=False)
        best = u[:, : ranks[name]] * values[: ranks[name]] @ v[: ranks[name]]
        assert float((updates[1][name] - best).norm() / update.norm()) < 1e-4


@pytest.mark.parametrize(("init", "scaling"), [("default", "constant"), ("olora", "alpha/sqrt(r)")])
def test_the_report_names_the_adapter_that_is_handed_over(
    model_folder: Path, completion_file: Path, tmp_path: Path, init: str, scaling: str
) -> None:
    """Trained at the lower rank; both questions are answered, and truncations are candidates whatever the start was."""
    settings = build_small_settings(init_lora_weights=init, scaling=scaling, ranks=(1, 4), max_steps=4, margin=5.0)
    selected = select_rank(str(model_folder), completion_file, tmp_path / "run", settings=settings)
    assert selected.adapter.path is not None
    config = json.loads((selected.adapter.path / "adapter_config.json").read_text())
    assert config["r"] == (selected.exported_adapter.load_rank or selected.exported_adapter.rank)
    named = f"r {config['r']} · lora_alpha {config['lora_alpha']:g} · learning rate"
    assert named in selected.report.read_text(encoding="utf-8")
    assert {cut.rank for cut in selected.adapters if cut.method == "truncated"} == {1, 2}
