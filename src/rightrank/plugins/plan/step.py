"""One training step, or one evaluation batch, run on the meta device under the tracer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from rightrank.models.kinds.base import Routing
from rightrank.plugins.plan.device import DeviceKernels, mark_adapted
from rightrank.plugins.plan.skeleton import Skeleton
from rightrank.plugins.plan.trace import StepTrace, Tracer
from rightrank.schema.plan_settings import PlanSettings
from rightrank.train.device import gradient_checkpointing_on
from rightrank.train.loss import OutputHead, chunked_cross_entropy
from rightrank.train.multi_lora import install


def trace_step(skeleton: Skeleton, settings: PlanSettings, training: bool = True) -> StepTrace:
    """The allocations of a step (or, without `training`, of an evaluation batch) of `settings` on the device."""
    model, device = skeleton.model, settings.device
    tracer = Tracer(skeleton.stored(), skeleton.base.config.get_text_config().vocab_size, device)
    kernels = DeviceKernels(device, settings.padding)
    batch = settings.batch_size if training else settings.eval_batch_size or settings.batch_size
    with ExitStack() as stack:
        stack.enter_context(_multi_lora_forward(skeleton, settings, batch))
        stack.enter_context(_training_mode(model, settings, training))
        stack.enter_context(tracer.named_modules(model))
        stack.enter_context(nullcontext() if training else torch.no_grad())
        for mode in (tracer, kernels, torch.device("meta")):
            stack.enter_context(mode)
        loss = _loss(skeleton, settings, batch * len(skeleton.arms))
        tracer.phase = "backward"
        if training:
            # `loss.backward()` with the function modes on: torch disables them inside `Tensor.backward`, where checkpointed
            # blocks would then run on other kernels than in the forward pass.
            engine: Any = torch.autograd.graph._engine_run_backward
            ones = (torch.ones_like(loss),)
            engine((loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True)
            trainable = skeleton.trainable()
            tracer.trace.gradients = tracer.gradient_storages(trainable)
    tracer.stop()
    for parameter in skeleton.trainable():
        parameter.grad = None
    return tracer.trace


def _loss(skeleton: Skeleton, settings: PlanSettings, rows: int) -> torch.Tensor:
    ids = torch.empty((rows, settings.seq_len), dtype=torch.long)
    mask = {"attention_mask": torch.empty_like(ids)} if settings.padding else {}
    if settings.num_labels is not None:
        out = skeleton.model(input_ids=ids, **mask)
        labels = torch.empty((rows,), dtype=torch.long)
        return F.cross_entropy(out.logits.float(), labels)
    if settings.loss == "full":
        loss: torch.Tensor = skeleton.model(input_ids=ids, labels=torch.empty_like(ids), use_cache=False, **mask).loss
        return loss
    base = skeleton.base
    hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
    kept = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = ids[:, 1:].reshape(-1)
    return chunked_cross_entropy(kept, targets, OutputHead(base), 1.0)[0].sum()


@contextmanager
def _multi_lora_forward(skeleton: Skeleton, settings: PlanSettings, rows: int) -> Iterator[None]:
    """Within the block, adapted layers run PEFT's forward pass or the multi-LoRA one, with `rows` rows for each arm."""
    by_peft = not settings.is_packed or any(target.kind.why_alone for target in skeleton.targets)
    mark_adapted(skeleton.model, by_peft=by_peft)
    if not settings.is_packed:
        yield
        return
    count = len(skeleton.arms)
    seed = 0 if settings.lora_dropout else None
    routing = Routing.padded(skeleton.arms, [seed] * count, [rows] * count, [settings.seq_len] * count)
    adapted: list[tuple[str, Any]] = [
        (name, module)
        for name, module in skeleton.base.named_modules()
        if isinstance(module, LoraLayer | ModulesToSaveWrapper)
    ]
    for name, module in adapted:
        install(name, module, lambda: routing)
    try:
        yield
    finally:
        for _, module in adapted:
            del module.__dict__["forward"]


@contextmanager
def _training_mode(model: Any, settings: PlanSettings, training: bool) -> Iterator[None]:
    """Within the block, training or evaluation mode, with gradient checkpointing where the settings have it."""
    as_trainer = settings.loss == "full" and not settings.is_packed  # `select` trains in evaluation mode
    model.train(training and as_trainer)
    if not (settings.gradient_checkpointing and training):
        yield
        return
    with gradient_checkpointing_on(model.get_base_model()):
        model.train(as_trainer)
        if not as_trainer:
            for module in model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
        yield
