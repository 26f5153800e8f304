"""The memory budget: what fits, what each axis costs, and the changes that save memory, cheapest first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rightrank.plugins.plan.estimate import Estimator, RankEstimate
from rightrank.schema.plan_settings import PlanSettings
from rightrank.schema.results import AxisPrice, Change

CUDA_CONTEXT_BYTES = 512 * 2**20  # driver, kernels and libraries: 300 to 600 MiB by card and driver
CPU_PROCESS_BYTES = 700 * 2**20  # the interpreter with torch, transformers and peft loaded


@dataclass(frozen=True, slots=True)
class _Saving:
    """A change of settings that saves memory, and its cost in words."""

    values: dict[str, Any]
    price: str


def context_bytes(settings: PlanSettings) -> int:
    """Bytes of the process beside its tensors."""
    if settings.context_bytes is not None:
        return settings.context_bytes
    return CUDA_CONTEXT_BYTES if settings.device == "cuda" else CPU_PROCESS_BYTES


def total(reserved_bytes: int, settings: PlanSettings) -> int:
    return reserved_bytes + context_bytes(settings)


def needed(reserved_bytes: int, settings: PlanSettings) -> int:
    """Bytes that must be available: tensors, process and headroom."""
    return total(reserved_bytes, settings) + round(settings.headroom * reserved_bytes)


def rank_fits(estimator: Estimator, rank: int) -> bool:
    """`fits`, of the peak of `rank`."""
    return fits(estimator.estimate(rank).peak.reserved_bytes, estimator.settings)


def fits(reserved: int, settings: PlanSettings) -> bool:
    """Whether so many reserved bytes fit the memory of the settings; False where that is unknown."""
    return settings.memory_bytes is not None and needed(reserved, settings) <= settings.memory_bytes


def axis_prices(estimator: Estimator, largest: RankEstimate) -> list[AxisPrice]:
    """The cost of doubling the rank, the batch and the length, and of adapting all linear modules instead of some."""
    settings, rank = estimator.settings, largest.rank
    batch, length = settings.batch_size, settings.seq_len
    axes: list[tuple[str, dict[str, Any]]] = [
        (f"batch_size {batch} → {batch * 2}", {"batch_size": batch * 2}),
        (f"seq_len {length} → {length * 2}", {"seq_len": length * 2}),
    ]
    if settings.target_modules != ("all-linear",):
        names = ", ".join(settings.target_modules)
        axes.append((f"target_modules {names} → all-linear", {"ranks": (rank,), "target_modules": ("all-linear",)}))
    changed = [(axis, estimator.variant(**values).estimate(rank)) for axis, values in axes]
    if rank * 2 <= estimator.rank_limit:
        changed.insert(0, (f"rank {rank} → {rank * 2}", estimator.beyond(rank * 2)))
    prices = []
    for axis, estimate in changed:
        reserved = estimate.peak.reserved_bytes
        prices.append(
            AxisPrice(
                axis=axis,
                peak_reserved_bytes=reserved,
                difference_bytes=reserved - largest.peak.reserved_bytes,
                flops_factor=estimate.flops / largest.flops,
            )
        )
    return prices


def cheapest_changes(estimator: Estimator) -> list[Change]:
    """Changes that make the smallest rank fit, cheapest first; those that save nothing are omitted.

    Changes are added until the rank fits; then each that is no longer needed is removed, the costliest first.
    """
    start = estimator.variant(ranks=(min(estimator.settings.ranks),))
    taken: list[_Saving] = []
    current, reserved = start, _reserved(start)
    for saving in _savings(start.settings):
        changed = current.variant(**saving.values)
        saved = _reserved(changed)
        if saved >= reserved:
            continue
        taken.append(saving)
        current, reserved = changed, saved
        if fits(reserved, current.settings):
            taken = _shortest(start, taken)
            break
    return _as_changes(start, taken)


def _savings(settings: PlanSettings) -> list[_Saving]:
    """Candidate changes in order of cost: first those that cost no quality and no time, then time, then precision."""
    savings = []
    if settings.loss == "full":
        savings.append(_Saving({"loss": "chunked"}, "none: the same loss, with the logits in chunks"))
    if settings.attn_implementation == "eager":
        savings.append(_Saving({"attn_implementation": "sdpa"}, "none: the same attention, fused"))
    if settings.optim in ("adamw", "adamw_fused") and not settings.is_packed:  # `select` has 32-bit states alone
        savings.append(_Saving({"optim": "paged_adamw_8bit"}, "8-bit optimizer states; needs bitsandbytes"))
    if settings.dtype == "float32" and settings.autocast is None and settings.device == "cuda":
        savings.append(_Saving({"dtype": "bfloat16"}, "frozen weights and activations in 16 bits"))
    if settings.device == "cpu":
        savings = [saving for saving in savings if "optim" not in saving.values]
    if settings.adapters_per_pass > 1:
        savings.append(_Saving({"adapters_per_pass": 1}, "arms train one after the other: more time"))
    if not settings.gradient_checkpointing:
        savings.append(_Saving({"gradient_checkpointing": True}, "about a third more time per step"))
    batch = settings.batch_size
    while batch > 1:
        batch //= 2
        savings.append(_Saving({"batch_size": batch}, "gradients accumulate over more batches: more time"))
    if not (settings.load_in_4bit or settings.load_in_8bit):
        savings.append(_Saving({"load_in_4bit": True}, "frozen weights in 4 bits: lower quality, slower steps"))
    length = settings.seq_len
    while length > 256:
        length //= 2
        savings.append(_Saving({"seq_len": length}, "longer examples are truncated"))
    return savings


def _shortest(start: Estimator, taken: list[_Saving]) -> list[_Saving]:
    kept = _last_of_each(taken)
    for saving in reversed(kept[:-1]):
        fewer = [other for other in kept if other is not saving]
        changed = start.variant(**_merged(fewer))
        if fits(_reserved(changed), changed.settings):
            kept = fewer
    return kept


def _as_changes(start: Estimator, savings: list[_Saving]) -> list[Change]:
    changes = []
    current = start
    for saving in _last_of_each(savings):
        current = current.variant(**saving.values)
        reserved = _reserved(current)
        ((name, value),) = saving.values.items()
        changes.append(
            Change(
                setting=name,
                value=str(value),
                peak_reserved_bytes=reserved,
                fits=fits(reserved, current.settings),
                price=saving.price,
            )
        )
    return changes


def _last_of_each(savings: list[_Saving]) -> list[_Saving]:
    """Of several changes to one setting, the last."""
    last = {name: saving for saving in savings for name in saving.values}
    return [saving for saving in savings if all(last[name] is saving for name in saving.values)]


def _merged(savings: list[_Saving]) -> dict[str, Any]:
    return {name: value for saving in savings for name, value in saving.values.items()}


def _reserved(estimator: Estimator) -> int:
    return estimator.estimate(estimator.settings.ranks[0]).peak.reserved_bytes
