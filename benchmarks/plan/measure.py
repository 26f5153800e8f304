"""Tensor memory of real training steps on the CPU, as torch's profiler counts it, and CUDA's own counters.

The step measured is written here anew, with real tensors and real kernels, and shares no code with the planner but the
chunked loss that `select` trains with.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from rightrank.engine.bench import recomputed_blocks
from rightrank.engine.loss import chunked_cross_entropy, output_head
from rightrank.settings import PlanSettings

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Measured:
    """A step's highest point, in bytes."""

    peak_bytes: int
    reserved_bytes: int | None


def measure(config: Any, settings: PlanSettings, rank: int) -> Measured:
    """Train a randomly initialised model for three steps; the third is measured."""
    torch.manual_seed(0)
    device = torch.device(settings.device)
    model = AutoModelForCausalLM.from_config(
        config, dtype=TYPES[settings.dtype], attn_implementation=settings.attn_implementation
    ).to(device)
    targets: Any = "all-linear" if settings.target_modules == ("all-linear",) else list(settings.target_modules)
    adapted: Any = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            target_modules=targets,
            exclude_modules=list(settings.exclude_modules) or None,
            use_dora=settings.use_dora,
            modules_to_save=list(settings.modules_to_save) or None,
        ),
    )
    adapted.train(settings.loss == "full")
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True if settings.optimizer == "adamw_fused" else None)
    shape = (settings.batch_size, settings.seq_len)
    ids = torch.randint(1, config.get_text_config().vocab_size, shape, device=device)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if settings.padding:
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        batch["attention_mask"] = mask
    with _recomputed(adapted, settings):
        for _ in range(2):
            _step(adapted, batch, settings, optimizer)
        gc.collect()
        return _measured_step(adapted, batch, settings, optimizer)


def _measured_step(model: Any, batch: Mapping[str, torch.Tensor], settings: PlanSettings, optimizer: Any) -> Measured:
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        _step(model, batch, settings, optimizer)
        return Measured(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    standing = _standing_bytes(model, optimizer)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        _step(model, batch, settings, optimizer)
    return Measured(standing + _highest(profiler), None)


def _highest(profiler: Any) -> int:
    """The highest sum of the profiler's memory events, in order of time."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = highest = 0
    for _, change in changes:
        now += change
        highest = max(highest, now)
    return highest


def _standing_bytes(model: Any, optimizer: Any) -> int:
    """Parameters, buffers and optimizer states: there before the step and after it."""
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    tensors = [*model.parameters(), *model.buffers(), *states]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _step(model: Any, batch: Mapping[str, torch.Tensor], settings: PlanSettings, optimizer: Any) -> None:
    autocast: Any = nullcontext()
    if settings.autocast is not None:
        autocast = torch.autocast(settings.device, dtype=TYPES[settings.autocast])
    with autocast:
        loss = _loss(model, batch, settings)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _loss(model: Any, batch: Mapping[str, torch.Tensor], settings: PlanSettings) -> torch.Tensor:
    if settings.loss == "full":
        loss: torch.Tensor = model(**batch, use_cache=False).loss
        return loss
    base = model.get_base_model()
    hidden = base.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    keep = torch.ones_like(batch["labels"][:, 1:], dtype=torch.bool)
    return chunked_cross_entropy(hidden[:, :-1][keep], batch["labels"][:, 1:][keep], output_head(base), 1.0)[0]


@contextmanager
def _recomputed(model: Any, settings: PlanSettings) -> Any:
    if not settings.gradient_checkpointing:
        yield
        return
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    if settings.loss == "chunked":
        with recomputed_blocks(model.get_base_model()):
            yield
    else:
        yield
