"""What fits: the budget, the price of each axis, and the changes that save memory, cheapest first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rightrank.planning.estimate import Estimator, RankEstimate
from rightrank.records.plan import AxisPrice, Change
from rightrank.settings import PlanSettings

CUDA_CONTEXT_BYTES = 512 * 2**20  # driver, kernels and libraries: 300 to 600 MiB by card and driver
CPU_PROCESS_BYTES = 700 * 2**20  # the interpreter with torch, transformers and peft loaded


@dataclass(frozen=True, slots=True)
class _Step:
    """A change of settings and what it costs."""

    values: dict[str, Any]
    price: str


def context_bytes(settings: PlanSettings) -> int:
    """What the process takes beside its tensors."""
    if settings.context_bytes is not None:
        return settings.context_bytes
    return CUDA_CONTEXT_BYTES if settings.device == "cuda" else CPU_PROCESS_BYTES


def total(reserved_bytes: int, settings: PlanSettings) -> int:
    return reserved_bytes + context_bytes(settings)


def needed(reserved_bytes: int, settings: PlanSettings) -> int:
    """What has to be there: tensors, context and the headroom."""
    return total(reserved_bytes, settings) + round(settings.headroom * reserved_bytes)


def axis_prices(estimator: Estimator, largest: RankEstimate) -> list[AxisPrice]:
    """What the next doubling of rank, batch and length costs, and all linear modules in the place of some."""
    settings, rank = estimator.settings, largest.rank
    batch, length = settings.batch_size, settings.seq_len
    axes: list[tuple[str, dict[str, Any]]] = [
        (f"batch_size {batch} → {batch * 2}", {"batch_size": batch * 2}),
        (f"seq_len {length} → {length * 2}", {"seq_len": length * 2}),
    ]
    if rank * 2 <= estimator.rank_limit:
        axes.insert(0, (f"rank {rank} → {rank * 2}", {"ranks": (*settings.ranks, rank * 2)}))
    if settings.target_modules != ("all-linear",):
        names = ", ".join(settings.target_modules)
        axes.append((f"target_modules {names} → all-linear", {"ranks": (rank,), "target_modules": ("all-linear",)}))
    prices = []
    for axis, values in axes:
        changed = estimator.variant(**values)
        estimate = changed.estimate(max(changed.settings.ranks))
        reserved = estimate.highest.reserved_bytes
        prices.append(
            AxisPrice(
                axis=axis,
                peak_reserved_bytes=reserved,
                difference_bytes=reserved - largest.highest.reserved_bytes,
                flops_factor=estimate.flops / largest.flops,
            )
        )
    return prices


def cheapest_changes(estimator: Estimator) -> list[Change]:
    """Changes for the smallest rank, from the cheapest on, until it fits; those that save nothing are left out.

    What is not needed once the last is taken is taken out again, the dearest tried first.
    """
    start = estimator.variant(ranks=(min(estimator.settings.ranks),))
    taken: list[_Step] = []
    current, reserved = start, _reserved(start)
    for step in _steps(start.settings):
        changed = current.variant(**step.values)
        saved = _reserved(changed)
        if saved >= reserved:
            continue
        taken.append(step)
        current, reserved = changed, saved
        if _fits(reserved, current.settings):
            taken = _shortest(start, taken)
            break
    return _as_changes(start, taken)


def _steps(settings: PlanSettings) -> list[_Step]:
    """Changes by what they cost: first none of quality or time, then time, then precision."""
    steps = []
    if settings.loss == "full":
        steps.append(_Step({"loss": "chunked"}, "nothing: the same loss, the logits in pieces"))
    if settings.attn_implementation == "eager":
        steps.append(_Step({"attn_implementation": "sdpa"}, "nothing: the same attention, fused"))
    if settings.optimizer in ("adamw", "adamw_fused"):
        steps.append(_Step({"optimizer": "paged_adamw_8bit"}, "8-bit optimizer states; needs bitsandbytes"))
    if settings.dtype == "float32" and settings.autocast is None and settings.device == "cuda":
        steps.append(_Step({"dtype": "bfloat16"}, "frozen weights and activations in 16 bits"))
    if settings.device == "cpu":
        steps = [step for step in steps if "optimizer" not in step.values]
    if settings.arms > 1:
        steps.append(_Step({"arms": 1}, "arms one after the other: more time"))
    if not settings.gradient_checkpointing:
        steps.append(_Step({"gradient_checkpointing": True}, "about a third more time a step"))
    batch = settings.batch_size
    while batch > 1:
        batch //= 2
        steps.append(_Step({"batch_size": batch}, "accumulate gradients over more batches: more time"))
    if not (settings.load_in_4bit or settings.load_in_8bit):
        steps.append(_Step({"load_in_4bit": True}, "frozen weights in 4 bits: some quality, slower steps"))
    length = settings.seq_len
    while length > 256:
        length //= 2
        steps.append(_Step({"seq_len": length}, "longer items are cut"))
    return steps


def _shortest(start: Estimator, taken: list[_Step]) -> list[_Step]:
    kept = _last_of_each(taken)
    for step in reversed(kept[:-1]):
        fewer = [other for other in kept if other is not step]
        changed = start.variant(**_merged(fewer))
        if _fits(_reserved(changed), changed.settings):
            kept = fewer
    return kept


def _as_changes(start: Estimator, steps: list[_Step]) -> list[Change]:
    changes = []
    current = start
    for step in _last_of_each(steps):
        current = current.variant(**step.values)
        reserved = _reserved(current)
        ((name, value),) = step.values.items()
        fits = _fits(reserved, current.settings)
        changes.append(
            Change(setting=name, value=str(value), peak_reserved_bytes=reserved, fits=fits, price=step.price)
        )
    return changes


def _last_of_each(steps: list[_Step]) -> list[_Step]:
    """Of steps on one setting, only the last counts."""
    last = {name: step for step in steps for name in step.values}
    return [step for step in steps if all(last[name] is step for name in step.values)]


def _merged(steps: list[_Step]) -> dict[str, Any]:
    return {name: value for step in steps for name, value in step.values.items()}


def _reserved(estimator: Estimator) -> int:
    return estimator.estimate(estimator.settings.ranks[0]).highest.reserved_bytes


def _fits(reserved: int, settings: PlanSettings) -> bool:
    return settings.memory_bytes is not None and needed(reserved, settings) <= settings.memory_bytes
