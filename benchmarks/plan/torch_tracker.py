"""torch's own memory tracking under fake tensors beside the plan's trace, at equal settings, against torch's profiler.

    python -m benchmarks.plan.torch_tracker [--out benchmarks/plan/results/torch_tracker.json]

Each case gives three peaks of the third training step on a CPU: measured by the profiler (`measure.py`), planned, and
tracked by `torch.distributed._tools.mem_tracker.MemTracker` over the same step on tensors of `FakeTensorMode`; and the
processor seconds of the last two. Where a step fails under fake tensors, its error stands in the place of the bytes. The
result also has what MemTracker gives for a CUDA device on this machine.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM

from benchmarks.machine import machine
from benchmarks.plan.architectures import SMALL_CONFIGS
from benchmarks.plan.measure import TYPES, measure
from rightrank.plugins.plan.planner import plan_config
from rightrank.schema.plan_settings import PlanSettings

CASES: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}]
ARCHITECTURES = ("llama", "gpt2", "moe")
STEPS = 3
SHARED: dict[str, Any] = {"dtype": "float32", "batch_size": 4, "seq_len": 128, "ranks": (16,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    on_cuda = tracked(SMALL_CONFIGS["llama"], PlanSettings(**SHARED, device="cuda"))
    print(on_cuda, flush=True)
    rows = []
    for name in ARCHITECTURES:
        for case in CASES:
            rows.append(compare(name, SMALL_CONFIGS[name], case))
            print(json.dumps(rows[-1]), flush=True)
    if chosen.out is not None:
        found = {"machine": machine(), "tracked_on_cuda": on_cuda, "cases": rows}
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")


def tracked(make: Callable[[], Any], settings: PlanSettings) -> int | str:
    """MemTracker's peak in bytes, or the error with which the step fails."""
    try:
        return tracked_peak(make(), settings, settings.device)
    except RuntimeError as error:
        return str(error).splitlines()[0]


def compare(name: str, make: Callable[[], Any], case: dict[str, Any]) -> dict[str, Any]:
    values = {**SHARED, "device": "cpu", **case}
    if name == "moe":
        values["exclude_modules"] = ["shared_expert_gate"]
    settings = PlanSettings(**values)
    measured = measure(make(), settings, 16).peak_bytes
    begun = time.process_time()
    planned = plan_config(make(), name, settings).ranks[0].peak_bytes
    traced = time.process_time()
    found = tracked(make, settings)
    ended = time.process_time()
    return {
        "architecture": name,
        "case": case,
        "measured": measured,
        "planned": planned,
        "planned_error": round(planned / measured - 1, 5),
        "planned_seconds": round(traced - begun, 1),
        "tracked": found,
        "tracked_error": round(found / measured - 1, 5) if isinstance(found, int) else None,
        "tracked_seconds": round(ended - traced, 1),
    }


class FrozenTracker(MemTracker):
    """MemTracker without its gradient hooks, which it also registers on frozen parameters, where torch refuses them.

    Gradients count as temporary memory then, and in the total as before.
    """

    def _track_module_params_and_buffers(self, module: Any, install_grad_hooks: bool = True) -> Any:
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


def tracked_peak(config: Any, settings: PlanSettings, device: str) -> int:
    """Bytes at the highest point of three steps on fake tensors of `device`, as MemTracker counts them."""
    adapted = meta_model(config, settings)
    with FakeTensorMode(), torch.device(device):
        make_fake(adapted, device)
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        ids = torch.zeros((settings.batch_size, settings.seq_len), dtype=torch.long)
        tracker = FrozenTracker()
        tracker.track_external(adapted)
        with tracker:
            for _ in range(STEPS):
                adapted(input_ids=ids, labels=ids.clone(), use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                tracker.reset_mod_stats()  # it takes one step at a time
        return int(tracker.get_tracker_snapshot("peak")[torch.device(device)]["Total"])


def meta_model(config: Any, settings: PlanSettings) -> Any:
    """The adapted model on the meta device: PEFT cannot attach adapters to fake parameters."""
    with torch.device("meta"):
        how: dict[str, Any] = {"dtype": TYPES[settings.dtype], "attn_implementation": settings.attn_implementation}
        model: Any = AutoModelForCausalLM.from_config(config, **how)
        excluded = list(settings.exclude_modules) or None
        options: dict[str, Any] = {"r": 16, "target_modules": "all-linear", "exclude_modules": excluded}
        adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options), low_cpu_mem_usage=True)
    adapted.train()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted


def make_fake(model: Any, device: str) -> None:
    """Replace every parameter and buffer by a fake tensor on `device`, tied ones by the same."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                group[name] = made[id(tensor)]


if __name__ == "__main__":
    main()
