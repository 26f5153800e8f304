"""The peak by formula, for a model whose step cannot run on meta tensors; `accuracy.FORMULA` is its error bound.

    peak = weights + adapter + optimizer + gradients + activations + logits

Activations: each linear module keeps its input and its output once in the compute type, and each block keeps two
float32 copies of the hidden states. Logits: once in the compute type and three times in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rightrank.engine.loss import CHUNK_LOGITS
from rightrank.io.models import DTYPES
from rightrank.planning.optimizer import OptimizerMemory
from rightrank.planning.simulate import Peak, Resident
from rightrank.records.plan import Components
from rightrank.settings import PlanSettings

RESERVED_FACTOR = 1.06  # reserved over allocated bytes, as the allocator model gives in traced cases


def formula_peak(model: Any, residents: Sequence[Resident], optimizer: OptimizerMemory, settings: PlanSettings) -> Peak:
    """The peak of a step of `settings` by formula, bytes."""
    tokens = settings.batch_size * settings.arms * settings.seq_len
    width = DTYPES[settings.autocast or settings.dtype].itemsize
    config = model.config.get_text_config()
    # An adapted module counts once: neither its base layer nor A and B, which keep little, count again.
    inside = (".lora_", ".base_layer")
    linear = [m for name, m in model.named_modules() if _is_linear(m) and not any(part in name for part in inside)]
    kept = sum(tokens * (module.in_features + module.out_features) * width for module in linear)
    kept += tokens * config.num_hidden_layers * config.hidden_size * 8
    if settings.gradient_checkpointing:
        kept = kept // config.num_hidden_layers + tokens * config.num_hidden_layers * config.hidden_size * width
    at_once = tokens * config.vocab_size
    logits = at_once * (width + 12) if settings.loss == "full" else min(at_once, CHUNK_LOGITS) * 12
    if settings.num_labels is not None:
        logits = 0
    components: Components = {}
    for resident in residents:
        components[resident.component] = components.get(resident.component, 0) + resident.size
    components["optimizer"] = sum(optimizer.states)
    components["gradients"] = components.get("adapter", 0)
    components["activations"] = kept
    components["logits_and_loss"] = logits
    total = sum(components.values())
    reserved = total if settings.device == "cpu" else round(total * RESERVED_FACTOR)
    return Peak(total, reserved, components, {}, "loss, by formula")


def _is_linear(module: Any) -> bool:
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))
