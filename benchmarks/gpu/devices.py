"""Run the engine on a device that is not the CPU: check for equal losses and mixed devices, and count the lines that ran there.

    python -m benchmarks.gpu.devices [--cases NAMES] [--lines] [--out FILE]

Each case trains on `pretend` (see `pretend.py`) and on the CPU, through `select`'s own preparation and engine. `--lines` counts the lines of the
engine, the kinds and the planning that ran on the device, or, for plans, which run on shapes, for the device `cuda`. Lines of functions that
only import are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NoReturn
from unittest.mock import patch

import torch
from safetensors.torch import load_file

import rightrank
from benchmarks.gpu.pretend import install
from benchmarks.results import store_result
from benchmarks.tiny import (
    GPT2_SIZES,
    SIZES,
    make_tokenizer,
    sentences,
    small_settings,
    write_completions,
    write_jsonl,
    write_pairs,
)
from rightrank.bases import base_models
from rightrank.evaluation.loss import chunked_cross_entropy
from rightrank.runs import prepare as preparation
from rightrank.runs.selection import SelectionRequest
from rightrank.schema.errors import InterruptedRun, SettingsError
from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial, TrialDiverged, TrialFailed, TrialFinished, TrialOutcome
from rightrank.training import targets
from rightrank.training.loop import TrialFolders, train_trials
from rightrank.training.pace import choose_adapters_per_pass, measure_pace
from rightrank.training.runtime import Runtime

STEPS = 3
SOURCES = Path(base_models.__file__).parents[1]
COUNTED = ("training", "planning")
MIXTURE = SIZES | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {
    "target_modules": ("q_proj", "v_proj"),
    "target_parameters": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
}
LAST = {"layers_to_transform": (1,)}
Case = tuple[str, dict[str, Any], str, dict[str, Any]]  # class of the model, its sizes, form of the data, settings
CASES: dict[str, Case] = {
    "joined examples": ("Llama", SIZES, "language", {}),
    "padded examples, a window": ("Mistral", SIZES | {"head_dim": 8, "sliding_window": 8}, "language", {}),
    "dropout, accumulation": ("Llama", SIZES, "language", {"lora_dropout": 0.1, "gradient_accumulation_steps": 2}),
    "frozen prefix": ("Llama", SIZES, "language", LAST),
    "classes": ("Llama", SIZES, "classes", {}),
    "classes, BERT": ("Bert", {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}, "classes", {}),
    "pairs": ("Llama", SIZES, "pairs", {}),
    "pairs, frozen prefix": ("Llama", SIZES, "pairs", LAST),
    "bfloat16": ("Llama", SIZES, "language", {"dtype": "bfloat16"}),
    "recomputed activations": ("Llama", SIZES, "language", {"gradient_checkpointing": True}),
    "GPT-2": ("GPT2", GPT2_SIZES, "language", {}),
    "embeddings": ("Llama", SIZES, "language", {"target_modules": ("q_proj", "embed_tokens")}),
    "head trained whole": ("Llama", SIZES, "language", {"modules_to_save": ("lm_head",)}),
    "DoRA": ("Llama", SIZES, "language", {"use_dora": True}),
    "experts": ("Mixtral", MIXTURE, "language", EXPERTS),
    "answers": ("Llama", SIZES, "language", {"metrics": ("exact_match", "f1", "rougeL")}),
    "answers that are classes": ("Llama", SIZES, "classes", {"metrics": ("macro_f1",)}),
    "other ends": ("Llama", SIZES, "language", {}),
    "an adapter that exists": ("Llama", SIZES, "language", {}),
}  # fmt: skip
PLANS: dict[str, dict[str, Any]] = {  # of a tiny Llama, for CUDA
    "fits": {"memory_bytes": 2**33},
    "unknown memory": {},
    "fits nowhere": {"memory_bytes": 2**20},
    "4 bits": {"load_in_4bit": True},
    "8 bits": {"load_in_8bit": True, "optim": "adamw_8bit"},
    "several arms": {"adapters_per_pass": 4, "loss": "chunked"},
    "recomputed, padded, fused": {"gradient_checkpointing": True, "padding": True, "optim": "adamw_fused"},
    "float32, a large rank": {"dtype": "float32", "ranks": (2, 3, 4, 8)},
}


def run_case(name: str, device: str, folder: Path) -> dict[str, Any]:
    """Return losses and adapters of two arms, trained alone and in a pass, and of a truncation with moments if one is supported."""
    model, sizes, form, settings = CASES[name]
    request = _build_request(model, sizes, form, settings | {"device": device}, folder)
    prepared = preparation.prepare_selection(request, folder / "cache")
    runtime = prepared.runtime
    arms = [Arm(rank=rank, learning_rate=1e-2, lora_alpha=16.0, seed=rank, steps=STEPS) for rank in (2, 4)]
    paths = runtime.evaluator.fast_paths
    results: dict[str, Any] = {"base": runtime.evaluator.evaluate("validation").losses}
    results["taken"] = [paths.sequence_packing, paths.last_block is not None, paths.prefix is not None]
    base_loss = sum(results["base"])
    for mode, count in (("alone", 1), *([] if runtime.targets.unshared_reason else [("together", 2)])):
        for number, outcome in enumerate(_train_arms(runtime, arms, folder / mode, count, base_loss)):
            results[f"{mode} {number}"] = outcome.train_losses + outcome.example_losses
            results[f"{mode} {number} adapter"] = _compute_norms(folder / mode / f"t{number}")
    if runtime.targets.untruncatable_reason is None:
        cut = Arm(rank=1, learning_rate=1e-2, lora_alpha=16.0, seed=4, steps=1, truncate_from="t1")
        folders = TrialFolders(folder / "cut.ckpt", folder / "cut", None, folder / "alone" / "t1", folder / "moments")
        ended = next(train_trials(runtime, [Trial(trial_id="cut", arm=cut)], base_loss, lambda _: folders, Listener()))
        assert isinstance(ended, TrialFinished), ended
        results["cut"] = ended.train_losses + ended.example_losses
    if name == "other ends":
        assert choose_adapters_per_pass(runtime, arms, lambda _: None) >= 1
        assert measure_pace(runtime, arms[0]) is not None
        results |= run_other_ends(runtime, base_loss, folder)
    if name == "an adapter that exists":
        settings = request.settings.model_copy(update={"ranks": (1, 2)})
        adapter, data = folder / "alone" / "t1", folder / "data.jsonl"
        held_out = rightrank.resize(adapter, folder / "resized", data=data, settings=settings).held_out
        results["resized"] = [outcome.value for outcome in held_out or ()]
    return results


def run_other_ends(runtime: Runtime, base_loss: float, folder: Path) -> dict[str, list[float]]:
    """Run a training that is stopped and resumed, one that ends early and is continued, a pass that is halved for memory, and ends without a result."""
    arm = Arm(rank=2, learning_rate=1e-2, lora_alpha=16.0, seed=1, steps=STEPS)
    stopped_arm = arm.model_copy(update={"stop_at": 2})
    resumed_arm = arm.model_copy(update={"continue_from": "early"})
    results: dict[str, list[float]] = {}

    def end(name: str, arm: Arm, listener: Listener = SILENT, base: float = base_loss) -> TrialOutcome:
        previous_checkpoint = None if arm.continue_from is None else folder / f"{arm.continue_from}.ckpt"
        folders = TrialFolders(folder / f"{name}.ckpt", folder / name, previous_checkpoint)
        return next(train_trials(runtime, [Trial(trial_id=name, arm=arm)], base, lambda _: folders, listener))

    with contextlib.suppress(InterruptedRun):
        end("stopped", arm, StopListener())
    assert (folder / "stopped.ckpt").exists()
    for name, outcome in (
        ("base", end("base", arm.model_copy(update={"rank": 0, "steps": 0}))),
        ("stopped", end("stopped", arm)),
        ("early", end("early", stopped_arm)),
        ("continued", end("continued", resumed_arm)),
    ):
        assert isinstance(outcome, TrialFinished), outcome
        results[name] = outcome.train_losses + outcome.example_losses
    accumulate_gradients, pair = Runtime.accumulate_gradients, [arm, arm.model_copy(update={"rank": 4})]

    def one_alone(*arguments: Any) -> list[torch.Tensor]:
        return accumulate_gradients(*arguments) if len(arguments[2]) == 1 else _raise_memory_error()

    with patch.object(Runtime, "accumulate_gradients", one_alone):
        halved = _train_arms(runtime, pair, folder / "halved", 2, base_loss)
    results |= {f"halved {trial.rank}": trial.train_losses + trial.example_losses for trial in halved}
    with patch.object(Runtime, "accumulate_gradients", lambda *_: _raise_memory_error()):
        assert isinstance(end("none", arm), TrialFailed)
    assert isinstance(end("diverged", arm, base=1e-3), TrialDiverged)
    return results


def _raise_memory_error() -> NoReturn:
    raise RuntimeError("CUDA out of memory")


class StopListener(Listener):
    def should_stop(self) -> bool:
        return True


SILENT = Listener()


def plan_for_cuda(folder: Path) -> list[dict[str, Any]]:
    """Plan a tiny model for CUDA, as a table and within a selection, without a device."""
    from rightrank.cli.plan import _format_plan

    from rightrank.planning import plan
    from rightrank.planning.planner import plan_selection
    from rightrank.planning.trace import read_config

    request = _build_request("Llama", SIZES, "language", {}, folder)
    plans = []
    for name, settings in PLANS.items():
        plan_settings: Any = {"ranks": (2, 4), "batch_size": 4, "seq_len": 32, "device": "cuda"} | settings
        planned = plan(request.model, **plan_settings)
        assert f"{planned.targets} adapted matrices" in _format_plan(planned)
        plans.append({"plan": name, "peak_bytes": [row.peak_bytes for row in planned.ranks], "fits": planned.max_rank})
    config = read_config(request.model, False)
    large_settings = request.settings.model_copy(update={"memory_bytes": 2**30, "adapters_per_pass": 8})
    planned_selection = plan_selection(config, large_settings, 32, "cuda")
    fits, count = max(planned_selection.ranks), planned_selection.max_adapters_per_pass
    plans.append({"plan": "a selection", "fits": fits, "together": count})
    with contextlib.suppress(SettingsError):
        plan_selection(config, request.settings.model_copy(update={"memory_bytes": 2**20}), 32, "cuda")
        raise AssertionError("a selection that fits nowhere is planned")
    return plans


def _build_request(
    model: str, sizes: dict[str, Any], form: str, settings: dict[str, Any], folder: Path
) -> SelectionRequest:
    import transformers

    tokenizer, base, data = make_tokenizer(), folder / "base", folder / "data.jsonl"
    kind = "ForSequenceClassification" if form == "classes" else "LMHeadModel" if model == "GPT2" else "ForCausalLM"
    labels = {"num_labels": 2} if form == "classes" else {}
    config = getattr(transformers, f"{model}Config")(vocab_size=len(tokenizer), **sizes, **labels)
    torch.manual_seed(0)
    getattr(transformers, f"{model}{kind}")(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    if form == "classes":
        write_jsonl(data, [{"text": text, "label": "ab"["cat" in text]} for text in sentences(80, seed=2)])
    else:
        (write_pairs if form == "pairs" else write_completions)(data, 80)
    request_settings = {
        "ranks": (2, 4),
        "max_steps": STEPS,
        "max_eval_examples": 6,
        "batch_size": 4,
        "seq_len": 32,
    } | settings
    return SelectionRequest(str(base), None, data, small_settings(**request_settings))


def _train_arms(runtime: Any, arms: list[Arm], folder: Path, size: int, base_loss: float) -> list[TrialFinished]:
    trials = [Trial(trial_id=f"t{number}", arm=arm) for number, arm in enumerate(arms)]

    def places(trial: Trial) -> TrialFolders:
        return TrialFolders(folder / f"{trial.trial_id}.ckpt", folder / trial.trial_id)

    ended = sorted(
        train_trials(runtime, trials, base_loss, places, Listener(), size), key=lambda outcome: outcome.trial_id
    )
    finished = [outcome for outcome in ended if isinstance(outcome, TrialFinished)]
    assert len(finished) == len(arms), ended
    return finished


def _compute_norms(adapter: Path) -> list[float]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return [float(tensors[name].double().norm()) for name in sorted(tensors)]


@contextlib.contextmanager
def pretend_cuda() -> Iterator[None]:
    """Treat `cuda` as an available device inside the context."""
    plain = base_models.find_device

    def find(name: str) -> torch.device:  # replaces a device that the settings allow
        return install() if name == "cuda" else plain(name)

    with patch.object(base_models, "find_device", find), patch.object(targets, "find_device", find):
        yield


def compare(name: str, lines: LineCounter | None = None) -> dict[str, Any]:
    """Return the largest relative difference between the device and the CPU, of losses and of the adapters' norms."""
    results = []
    for device in ("cuda", "cpu"):
        counting = lines if lines is not None and device == "cuda" else contextlib.nullcontext()
        with tempfile.TemporaryDirectory() as folder, pretend_cuda(), counting:
            results.append(run_case(name, device, Path(folder)))
    ours, theirs = results
    assert ours.keys() == theirs.keys()
    assert ours["taken"] == theirs["taken"], "other faster ways on the device"
    far = {"losses": 0.0, "adapters": 0.0}
    for key in ours.keys() - {"taken"}:
        which = "adapters" if key.endswith("adapter") else "losses"
        assert len(ours[key]) == len(theirs[key])
        far[which] = max(
            far[which],
            *(
                abs(our_value / their_value - 1)
                for our_value, their_value in zip(ours[key], theirs[key], strict=True)
                if their_value
            ),
        )
    return {"case": name, **far}


def check_refusals() -> dict[str, bool]:
    """Return whether the device refuses what CUDA refuses: directly, and where the engine's loss gets labels on the CPU."""
    here = torch.zeros(2, 3, device=install())
    operations = {
        "operands": lambda: here + torch.zeros(2, 3),
        "a weight of the CPU": lambda: torch.nn.functional.linear(here, torch.zeros(4, 3)),
        "an index of the CPU": lambda: here[torch.tensor([0])],
        "a generator of the CPU": lambda: torch.rand(3, device=here.device, generator=torch.Generator()),
        "numpy": lambda: here.numpy(),
        "labels of the CPU": lambda: chunked_cross_entropy(here, torch.zeros(2, dtype=torch.long), lambda x: x, 1.0),
    }
    return {name: _is_refused(operation) for name, operation in operations.items()}


def _is_refused(operation: Callable[[], object]) -> bool:
    try:
        operation()
    except RuntimeError:
        return True
    return False


class LineCounter(contextlib.AbstractContextManager[None]):
    """A counter of the lines that run inside the context, including the backward pass's own thread."""

    def __init__(self) -> None:
        self.seen: dict[str, set[int]] = {}
        self._by_code: dict[CodeType, set[int] | None] = {}  # None if the code is not counted

    def __enter__(self) -> None:
        threading.settrace(self._call)
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]  # as the documentation has it

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code not in self._by_code:
            counted = any(code.co_filename.startswith(f"{SOURCES}/{folder}/") for folder in COUNTED)
            self._by_code[code] = self.seen.setdefault(code.co_filename, set()) if counted else None
        lines = self._by_code[code]
        if lines is None:
            return None

        def line(frame: FrameType, event: str, _: Any) -> Any:
            lines.add(frame.f_lineno)
            return line

        return line

    def table(self) -> list[dict[str, Any]]:
        """Return, by folder, the lines inside functions that ran, and the functions without any such line."""
        rows = []
        for folder in COUNTED:
            num_run = num_lines = 0
            silent: list[str] = []
            for path in sorted((SOURCES / folder).glob("*.py")):
                run_lines = self.seen.get(str(path), set())
                for name, lines in _iterate_functions(compile(path.read_text(encoding="utf-8"), str(path), "exec")):
                    num_lines, num_run = num_lines + len(lines), num_run + len(lines & run_lines)
                    silent += [f"{path.name}:{name}"] if lines and not lines & run_lines else []
            rows.append(
                {"folder": folder, "lines": num_lines, "ran": num_run, "share": num_run / num_lines, "silent": silent}
            )
        return rows


def _iterate_functions(code: CodeType) -> Iterator[tuple[str, set[int]]]:
    """Yield each function of a module with the lines of its body, without nested functions."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & 2:  # only functions have fast locals, class bodies do not
                lines = {line for _, _, line in constant.co_lines() if line and line != constant.co_firstlineno}
                yield constant.co_qualname, lines
            yield from _iterate_functions(constant)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=lambda text: text.split(";"), default=list(CASES))
    parser.add_argument("--lines", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(words)
    warnings.simplefilter("ignore")
    lines = LineCounter() if arguments.lines else None
    rows = []
    for name in arguments.cases:
        rows.append(compare(name, lines))
        print(json.dumps(rows[-1]), flush=True)
    plans: list[dict[str, Any]] = []
    if lines is not None:
        with tempfile.TemporaryDirectory() as folder, lines:
            plans = plan_for_cuda(Path(folder))
    table = [] if lines is None else lines.table()
    for row in table:
        print(f"{row['folder']:14} {row['ran']} of {row['lines']} lines, {row['share']:.0%}")
    store_result({"cases": rows, "refused": check_refusals(), "plans": plans, "lines": table}, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
