"""The engine on a device that is not the CPU: the same losses, nothing that mixes devices, and which lines have run there.

    python -m benchmarks.gpu.devices [--cases NAMES] [--lines] [--out FILE]

Each case trains on `pretend` (see `pretend.py`) and on the CPU, through `select`'s own preparation and engine. `--lines` counts the lines of the
engine, the kinds and the planning that ran on the device, or, for plans, which run on shapes, for the device `cuda`; a line of a function that
only imports is not counted.
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
from benchmarks.results import store
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
from rightrank.models import base_models
from rightrank.runs import prepare as preparation
from rightrank.runs.values import Request
from rightrank.schema.errors import InterruptedRun, SettingsError
from rightrank.schema.events import Listener
from rightrank.schema.trials import Arm, Trial, TrialDiverged, TrialFailed, TrialFinished, TrialOutcome
from rightrank.train import targets
from rightrank.train.loop import run_trial, train_trials
from rightrank.train.loss import chunked_cross_entropy
from rightrank.train.pace import adapters_per_pass_for, measure_pace
from rightrank.train.runtime import Runtime
from rightrank.train.trial import TrialFolders

STEPS = 3
SOURCES = Path(base_models.__file__).parents[1]
COUNTED = ("train", "models/kinds", "plugins/plan")
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
    "answers": ("Llama", SIZES, "language", {"metrics": ("exact_match", "f1", "rouge1", "rougeL")}),
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
    """Losses and adapters of two arms, alone and in a pass, and of a truncation with moments where one can be made."""
    model, sizes, form, settings = CASES[name]
    request = _request(model, sizes, form, settings | {"device": device}, folder)
    prepared = preparation.prepare(request, folder / "cache")
    runtime = prepared.runtime
    arms = [Arm(rank=rank, learning_rate=1e-2, lora_alpha=16.0, seed=rank, steps=STEPS) for rank in (2, 4)]
    paths = runtime.fast_paths
    found: dict[str, Any] = {"base": runtime.evaluate("selection").losses}
    found["taken"] = [paths.sequence_packing, paths.last_block is not None, paths.prefix is not None]
    base_loss = sum(found["base"])
    for way, count in (("alone", 1), *([] if runtime.targets.why_alone else [("together", 2)])):
        for number, one in enumerate(_trained(runtime, arms, folder / way, count, base_loss)):
            found[f"{way} {number}"] = one.train_losses + one.item_losses
            found[f"{way} {number} adapter"] = _weights(folder / way / f"t{number}")
    if runtime.targets.why_not_truncated is None:
        cut = Arm(rank=1, learning_rate=1e-2, lora_alpha=16.0, seed=4, steps=1, truncate_from="t1")
        places = TrialFolders(folder / "cut.ckpt", folder / "cut", None, folder / "alone" / "t1", folder / "moments")
        ended = next(train_trials(runtime, [Trial(trial_id="cut", arm=cut)], base_loss, lambda _: places, Listener()))
        assert isinstance(ended, TrialFinished), ended
        found["cut"] = ended.train_losses + ended.item_losses
    if name == "other ends":
        assert adapters_per_pass_for(runtime, arms, lambda _: None) >= 1
        assert measure_pace(runtime, arms[0]) is not None
        found |= other_ends(runtime, base_loss, folder)
    if name == "an adapter that exists":
        settings = request.settings.model_copy(update={"ranks": (1, 2)})
        adapter, data = folder / "alone" / "t1", folder / "data.jsonl"
        held_out = rightrank.resize(adapter, folder / "resized", data=data, settings=settings).held_out
        found["resized"] = [one.value for one in held_out or ()]
    return found


def other_ends(runtime: Runtime, base_loss: float, folder: Path) -> dict[str, list[float]]:
    """A training that is stopped and resumed, one that ends early and is continued, a pass that memory halves, and ends without a result."""
    arm = Arm(rank=2, learning_rate=1e-2, lora_alpha=16.0, seed=1, steps=STEPS)
    early = arm.model_copy(update={"stop_at": 2})
    rest = arm.model_copy(update={"continue_from": "early"})
    found: dict[str, list[float]] = {}

    def end(name: str, arm: Arm, listener: Listener = SILENT, base: float = base_loss) -> TrialOutcome:
        before = None if arm.continue_from is None else folder / f"{arm.continue_from}.ckpt"
        places = TrialFolders(folder / f"{name}.ckpt", folder / name, before)
        return run_trial(runtime, Trial(trial_id=name, arm=arm), base, places, listener)

    with contextlib.suppress(InterruptedRun):
        end("stopped", arm, Stops())
    assert (folder / "stopped.ckpt").exists()
    for name, outcome in (
        ("base", end("base", arm.model_copy(update={"rank": 0, "steps": 0}))),
        ("stopped", end("stopped", arm)),
        ("early", end("early", early)),
        ("continued", end("continued", rest)),
    ):
        assert isinstance(outcome, TrialFinished), outcome
        found[name] = outcome.train_losses + outcome.item_losses
    plain, pair = Runtime.accumulate_gradients, [arm, arm.model_copy(update={"rank": 4})]

    def one_alone(*given: Any) -> list[torch.Tensor]:
        return plain(*given) if len(given[2]) == 1 else _no_memory()

    with patch.object(Runtime, "accumulate_gradients", one_alone):
        halved = _trained(runtime, pair, folder / "halved", 2, base_loss)
    found |= {f"halved {one.rank}": one.train_losses + one.item_losses for one in halved}
    with patch.object(Runtime, "accumulate_gradients", lambda *_: _no_memory()):
        assert isinstance(end("none", arm), TrialFailed)
    assert isinstance(end("diverged", arm, base=1e-3), TrialDiverged)
    return found


def _no_memory() -> NoReturn:
    raise RuntimeError("CUDA out of memory")


class Stops(Listener):
    def should_stop(self) -> bool:
        return True


SILENT = Listener()


def plans_for_cuda(folder: Path) -> list[dict[str, Any]]:
    """The plans of a tiny model for CUDA, as a table and within a selection, without a device."""
    from rightrank.plugins import plan as plan_command
    from rightrank.plugins.plan.planner import plan_selection
    from rightrank.plugins.plan.skeleton import read_config

    request = _request("Llama", SIZES, "language", {}, folder)
    found = []
    for name, settings in PLANS.items():
        wanted: Any = {"ranks": (2, 4), "batch_size": 4, "seq_len": 32, "device": "cuda"} | settings
        planned = plan_command.plan(request.model, **wanted)
        assert f"{planned.targets} adapted matrices" in plan_command._plan_text(planned)
        found.append({"plan": name, "peak_bytes": [row.peak_bytes for row in planned.ranks], "fits": planned.max_rank})
    config = read_config(request.model, False)
    enough = request.settings.model_copy(update={"memory_bytes": 2**30, "adapters_per_pass": 8})
    planned_selection = plan_selection(config, enough, 32, "cuda")
    together = planned_selection.peak_of([2, 4])
    assert together is not None
    assert together > planned_selection.peak_bytes[4]
    fits, count = max(planned_selection.ranks), planned_selection.max_adapters_per_pass
    found.append({"plan": "a selection", "fits": fits, "together": count})
    with contextlib.suppress(SettingsError):
        plan_selection(config, request.settings.model_copy(update={"memory_bytes": 2**20}), 32, "cuda")
        raise AssertionError("a selection that fits nowhere is planned")
    return found


def _request(model: str, sizes: dict[str, Any], form: str, settings: dict[str, Any], folder: Path) -> Request:
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
    wanted = {"ranks": (2, 4), "max_steps": STEPS, "eval_items": 6, "batch_size": 4, "seq_len": 32} | settings
    return Request(str(base), None, data, small_settings(**wanted))


def _trained(runtime: Any, arms: list[Arm], folder: Path, size: int, base_loss: float) -> list[TrialFinished]:
    trials = [Trial(trial_id=f"t{number}", arm=arm) for number, arm in enumerate(arms)]

    def places(trial: Trial) -> TrialFolders:
        return TrialFolders(folder / f"{trial.trial_id}.ckpt", folder / trial.trial_id)

    ended = sorted(train_trials(runtime, trials, base_loss, places, Listener(), size), key=lambda one: one.trial_id)
    finished = [one for one in ended if isinstance(one, TrialFinished)]
    assert len(finished) == len(arms), ended
    return finished


def _weights(adapter: Path) -> list[float]:
    tensors = load_file(adapter / "adapter_model.safetensors")
    return [float(tensors[name].double().norm()) for name in sorted(tensors)]


@contextlib.contextmanager
def known_device() -> Iterator[None]:
    """Within the block, `cuda` is the device."""
    plain = base_models.find_device

    def find(name: str) -> torch.device:  # in place of a device that the settings know
        return install() if name == "cuda" else plain(name)

    with patch.object(base_models, "find_device", find), patch.object(targets, "find_device", find):
        yield


def compare(name: str, lines: Lines | None = None) -> dict[str, Any]:
    """The largest relative difference between the device and the CPU, of losses and of the adapters' norms."""
    found = []
    for device in ("cuda", "cpu"):
        counting = lines if lines is not None and device == "cuda" else contextlib.nullcontext()
        with tempfile.TemporaryDirectory() as folder, known_device(), counting:
            found.append(run_case(name, device, Path(folder)))
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    assert ours["taken"] == theirs["taken"], "other faster ways on the device"
    far = {"losses": 0.0, "adapters": 0.0}
    for key in ours.keys() - {"taken"}:
        which = "adapters" if key.endswith("adapter") else "losses"
        assert len(ours[key]) == len(theirs[key])
        far[which] = max(
            far[which], *(abs(one / other - 1) for one, other in zip(ours[key], theirs[key], strict=True) if other)
        )
    return {"case": name, **far}


def mixes() -> dict[str, bool]:
    """Whether what CUDA refuses is refused: by itself, and where the engine's loss takes labels of the CPU."""
    here = torch.zeros(2, 3, device=install())
    tried = {
        "operands": lambda: here + torch.zeros(2, 3),
        "a weight of the CPU": lambda: torch.nn.functional.linear(here, torch.zeros(4, 3)),
        "an index of the CPU": lambda: here[torch.tensor([0])],
        "a generator of the CPU": lambda: torch.rand(3, device=here.device, generator=torch.Generator()),
        "numpy": lambda: here.numpy(),
        "labels of the CPU": lambda: chunked_cross_entropy(here, torch.zeros(2, dtype=torch.long), lambda x: x, 1.0),
    }
    return {what: _is_refused(try_it) for what, try_it in tried.items()}


def _is_refused(try_it: Callable[[], object]) -> bool:
    try:
        try_it()
    except RuntimeError:
        return True
    return False


class Lines(contextlib.AbstractContextManager[None]):
    """Counts the lines that run inside the blocks, in the backward pass's own thread too."""

    def __init__(self) -> None:
        self.seen: dict[str, set[int]] = {}
        self._by_code: dict[CodeType, set[int] | None] = {}  # None: not counted

    def __enter__(self) -> None:
        threading.settrace(self._call)
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]  # as the documentation has it

    def _call(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if code not in self._by_code:
            counted = any(code.co_filename.startswith(f"{SOURCES}/{part}/") for part in COUNTED)
            self._by_code[code] = self.seen.setdefault(code.co_filename, set()) if counted else None
        seen = self._by_code[code]
        if seen is None:
            return None

        def line(frame: FrameType, event: str, _: Any) -> Any:
            seen.add(frame.f_lineno)
            return line

        return line

    def table(self) -> list[dict[str, Any]]:
        """Lines that ran of those inside functions, by folder; and the functions of which none ran."""
        rows = []
        for part in COUNTED:
            ran = known = 0
            silent: list[str] = []
            for path in sorted((SOURCES / part).glob("*.py")):
                seen = self.seen.get(str(path), set())
                for name, lines in _functions(compile(path.read_text(encoding="utf-8"), str(path), "exec")):
                    known, ran = known + len(lines), ran + len(lines & seen)
                    silent += [f"{path.name}:{name}"] if lines and not lines & seen else []
            rows.append({"folder": part, "lines": known, "ran": ran, "share": ran / known, "silent": silent})
        return rows


def _functions(code: CodeType) -> Iterator[tuple[str, set[int]]]:
    """Each function of a module, and the lines of its body; what is nested counts by itself."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            if constant.co_flags & 2:  # of a function: it has fast locals; a class body has none
                lines = {line for _, _, line in constant.co_lines() if line and line != constant.co_firstlineno}
                yield constant.co_qualname, lines
            yield from _functions(constant)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=lambda text: text.split(";"), default=list(CASES))
    parser.add_argument("--lines", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(words)
    warnings.simplefilter("ignore")
    lines = Lines() if given.lines else None
    rows = []
    for name in given.cases:
        rows.append(compare(name, lines))
        print(json.dumps(rows[-1]), flush=True)
    plans: list[dict[str, Any]] = []
    if lines is not None:
        with tempfile.TemporaryDirectory() as folder, lines:
            plans = plans_for_cuda(Path(folder))
    table = [] if lines is None else lines.table()
    for row in table:
        print(f"{row['folder']:14} {row['ran']} of {row['lines']} lines, {row['share']:.0%}")
    store({"cases": rows, "refused": mixes(), "plans": plans, "lines": table}, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
