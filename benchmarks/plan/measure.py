"""Measure the tensor memory of real training steps, on the CPU with torch's profiler and on CUDA with its counters.

The measured step is implemented here independently, with real tensors and kernels. It shares with the planner only what
`select` trains with: the chunked loss, and the pass of arms. Quantised models are loaded by transformers and bitsandbytes.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from rightrank.evaluation.batches import Batch
from rightrank.evaluation.device import enable_gradient_checkpointing
from rightrank.evaluation.loss import OutputHead, chunked_cross_entropy, classification_loss, head_loss
from rightrank.schema.settings import PlanSettings, SelectSettings
from rightrank.schema.trials import Arm
from rightrank.training.multi_lora import ArmBatch, MultiLora
from rightrank.training.targets import find_targets, make_lora_config

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class StepPeak:
    """The peak memory of a step, in bytes."""

    peak_bytes: int
    reserved_bytes: int | None


def measure(config: Any, settings: PlanSettings, rank: int) -> StepPeak:
    """Train a randomly initialised model for three steps, and measure the third."""
    torch.manual_seed(0)
    model = _build_base(config, settings)
    if settings.packed or settings.adapters_per_pass > 1:
        return _measure_multi_lora(model, settings, rank)
    device = torch.device(settings.device)
    targets: Any = "all-linear" if settings.target_modules == ("all-linear",) else list(settings.target_modules)
    adapted: Any = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            target_modules=targets,
            exclude_modules=list(settings.exclude_modules) or None,
            target_parameters=list(settings.target_parameters) or None,
            use_dora=settings.use_dora,
            modules_to_save=list(settings.modules_to_save) or None,
        ),
    )
    adapted.train(settings.loss == "full")
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True if settings.optim == "adamw_fused" else None)
    shape = (settings.batch_size, settings.seq_len)
    ids = torch.randint(1, config.get_text_config().vocab_size, shape, device=device)
    batch = {"input_ids": ids, "labels": ids.clone()}
    if settings.padding:
        batch["attention_mask"] = _make_padded_mask(ids)
    with _enable_recomputation(adapted, settings):
        return _measure_third_step(
            lambda: _run_step(adapted, batch, settings, optimizer), adapted, [optimizer], settings.device
        )


def _build_base(config: Any, settings: PlanSettings) -> Any:
    """Build the base model on its device; a quantised one is saved and loaded as users do."""
    auto: Any = AutoModelForCausalLM
    if settings.num_labels is not None:
        auto, config.num_labels, config.pad_token_id = AutoModelForSequenceClassification, settings.num_labels, 0
    how: dict[str, Any] = {"dtype": TYPES[settings.dtype], "attn_implementation": settings.attn_implementation}
    model = auto.from_config(config, **how)
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return model.to(settings.device)
    options: dict[str, Any] = {"load_in_8bit": True}
    if settings.load_in_4bit:
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": TYPES[settings.dtype]}
    make: Any = BitsAndBytesConfig
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model = auto.from_pretrained(
            folder, quantization_config=make(**options), device_map={"": settings.device}, **how
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # a product without a gradient
    return model


def _measure_multi_lora(model: Any, settings: PlanSettings, rank: int) -> StepPeak:
    """Measure the arms of the settings in one pass, as `select` trains them."""
    model.requires_grad_(False)
    model.eval()
    select = SelectSettings(ranks=(rank, rank + 1), target_modules=settings.target_modules)
    select = select.model_copy(update={"exclude_modules": settings.exclude_modules})
    classification = settings.num_labels is not None
    names = find_targets(model, select, classification).names
    arm = Arm(rank=rank, learning_rate=1e-4, lora_alpha=16.0, seed=0, steps=10)
    shape = (settings.batch_size, settings.seq_len)
    ids = torch.randint(1, model.config.get_text_config().vocab_size, shape, device=settings.device)
    labels = torch.zeros(len(ids), dtype=torch.long, device=settings.device) if classification else ids.clone()
    mask = _make_padded_mask(ids) if settings.padding else torch.ones_like(ids)
    batch = Batch(ids, mask, labels, tuple(range(len(ids))), ids.numel())
    objective: Any = classification_loss if classification else head_loss
    with (
        MultiLora(model, select) as multi_lora,
        enable_gradient_checkpointing(model) if settings.gradient_checkpointing else nullcontext(),
    ):
        optimizers, arm_batches = [], []
        for number in range(settings.adapters_per_pass):
            config = make_lora_config(select, arm, classification, names)
            parameters = list(multi_lora.add(f"arm_{number}", arm, config).values())
            optimizers.append(torch.optim.AdamW(parameters, lr=1e-4, fused=True))
            arm_batches.append(ArmBatch(f"arm_{number}", batch, 1.0, None))

        def step() -> None:
            with multi_lora.route(arm_batches, 0) as (rows, _):
                torch.autograd.backward(objective(model, rows, 1.0).total)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return _measure_third_step(step, multi_lora.peft_model, optimizers, settings.device)


def _make_padded_mask(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return mask


def _measure_third_step(step: Callable[[], None], model: Any, optimizers: Sequence[Any], device: str) -> StepPeak:
    """Measure the third step. The first two create what persists: optimizer states, and the allocator's segments."""
    for _ in range(2):
        step()
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return StepPeak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    standing = _count_persistent_bytes(model, optimizers)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return StepPeak(standing + _read_peak(profiler), None)


def _read_peak(profiler: Any) -> int:
    """Return the largest sum of the profiler's memory events, in order of time."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = highest = 0
    for _, change in changes:
        now += change
        highest = max(highest, now)
    return highest


def _count_persistent_bytes(model: Any, optimizers: Sequence[Any]) -> int:
    """Return the bytes that exist before and after the step: parameters, buffers, constants of quantised weights and optimizer states."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for state in states for value in state.values() if torch.is_tensor(value)]
    for module in model.modules():
        weight = getattr(module, "weight", None)
        constants = getattr(weight, "quant_state", None)
        if constants is not None:
            tensors += [constants.absmax, constants.code]
        if getattr(weight, "SCB", None) is not None:
            tensors.append(weight.SCB)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _run_step(model: Any, batch: Mapping[str, torch.Tensor], settings: PlanSettings, optimizer: Any) -> None:
    _compute_loss(model, batch, settings).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _compute_loss(model: Any, batch: Mapping[str, torch.Tensor], settings: PlanSettings) -> torch.Tensor:
    if settings.loss == "full":
        loss: torch.Tensor = model(**batch, use_cache=False).loss
        return loss
    base = model.get_base_model()
    hidden = base.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    keep = torch.ones_like(batch["labels"][:, 1:], dtype=torch.bool)
    return chunked_cross_entropy(hidden[:, :-1][keep], batch["labels"][:, 1:][keep], OutputHead(base), 1.0)[0].sum()


@contextmanager
def _enable_recomputation(model: Any, settings: PlanSettings) -> Any:
    if not settings.gradient_checkpointing:
        yield
        return
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    if settings.loss == "chunked":
        with enable_gradient_checkpointing(model.get_base_model()):
            yield
    else:
        yield
