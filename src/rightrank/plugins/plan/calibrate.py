"""Calibration: a few real steps on this device give the seconds per operation and the error of the trace in memory.

Four groups of the model's blocks with random weights represent the model: the same shapes, types and kernels in a
fraction of the memory. The result is stored in the user's cache folder, by device, type, width and training loop.
"""

from __future__ import annotations

import gc
import json
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rightrank.data.files import cache_folder, write_text
from rightrank.models.base_models import DTYPES, find_device, quantisation, quiet_third_parties, require_quantisation
from rightrank.plugins.plan.estimate import Estimator, RankEstimate
from rightrank.plugins.plan.kernels import DeviceKind
from rightrank.plugins.plan.skeleton import Skeleton, lora_config
from rightrank.plugins.plan.stack import TRACED_GROUPS, reduced_config
from rightrank.plugins.plan.step import multi_lora_forward, training_mode
from rightrank.plugins.plan.trace import PERSISTENT
from rightrank.schema.errors import SettingsError
from rightrank.schema.plan_settings import PlanSettings
from rightrank.schema.results import Error, Source
from rightrank.train.device import PeakMemory
from rightrank.train.loss import OutputHead, chunked_cross_entropy
from rightrank.train.targets import without_peft_noise

TRACED_ON_CPU = Error(
    share=0.01, basis="0.06% at worst in 76 cases against torch's profiler, several adapters per pass among them"
)
TRACED_ON_CUDA = Error(
    share=0.05, basis="assumed: not measured on a GPU; 1.4% at worst against three published peaks, not a blind test"
)
QUANTISED_ON_CUDA = Error(share=0.1, basis="assumed: the workspace inside bitsandbytes' kernels is by rule")
SHARDED = Error(share=0.1, basis="by rule; 0.5% at worst against two processes on a CPU, one small model")
MEASURED = Error(share=0.02, basis="steps of four groups of blocks on this device, extrapolated to the whole depth")
FORMULA = Error(share=1.15, basis="by rule; −53% to +40% in 76 traced cases that were measured on a CPU")
EXACT = Error(share=0.0, basis="counted")


def errors_of(settings: PlanSettings, source: Source) -> dict[str, Error]:
    """Error bounds by source, for a plan whose peak has `source`."""
    return {"exact": EXACT, source: peak_error(settings, source)}


def peak_error(settings: PlanSettings, source: Source) -> Error:
    """The error bound of the peak: the largest of those it rests on."""
    bases = [_of_source(source, settings.device)]
    if source != "formula" and settings.device == "cuda" and (settings.load_in_4bit or settings.load_in_8bit):
        bases.append(QUANTISED_ON_CUDA)
    if settings.sharding != "none":
        bases.append(SHARDED)
    return max(bases, key=lambda error: error.share)


def _of_source(source: Source, device: DeviceKind) -> Error:
    if source == "formula":
        return FORMULA
    if source == "measured":
        return MEASURED
    return TRACED_ON_CPU if device == "cpu" else TRACED_ON_CUDA


STEPS = 4  # timed; the first warms up


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measurements of one device."""

    key: str
    seconds_per_flop: float  # of a training step
    seconds_per_forward_flop: float  # of an evaluation
    step_factor: float  # measured over traced bytes of a step, without weights, adapter and optimizer
    process_bytes: int | None  # of the process beside its tensors, on a CPU; None on CUDA


@dataclass(frozen=True, slots=True)
class _Measured:
    step_seconds: float
    forward_seconds: float
    peak_bytes: int
    process_bytes: int | None


def calibrate(config: Any, settings: PlanSettings) -> Calibration:
    """Run the steps, and store what they took.

    Raises:
        SettingsError: the device is not available, or the settings cannot be measured.
        MissingExtraError: quantised weights without bitsandbytes.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            "calibrate needs the device that is planned for, and no CUDA device is available; give device cpu"
        )
    if settings.autocast or settings.adapters_per_pass > 1 or settings.sharding != "none":
        raise SettingsError("calibrate measures one arm on one device; leave out autocast, arms and sharding")
    if "8bit" in settings.optim:
        settings = settings.model_copy(update={"optim": "adamw_fused"})  # a step takes the same time
    if bits := _bits(settings):
        require_quantisation(bits, find_device(settings.device))
    text = config.get_text_config()
    small = reduced_config(config, min(text.num_hidden_layers, TRACED_GROUPS))
    rank = min(settings.ranks)
    estimator = Estimator(small, settings.model_copy(update={"ranks": (rank,), "layers_to_transform": None}))
    estimate = estimator.estimate(rank)
    measured = _measure(small, estimator.settings, rank)
    forward = estimator.forward_flops(rank) * settings.batch_size
    found = Calibration(
        calibration_key(config, settings),
        measured.step_seconds / estimate.flops,
        measured.forward_seconds / forward,
        _step_factor(estimate, measured.peak_bytes),
        measured.process_bytes,
    )
    known = _read()
    known[found.key] = asdict(found)
    _path().parent.mkdir(parents=True, exist_ok=True)
    write_text(_path(), json.dumps(known, indent=1, sort_keys=True) + "\n")
    return found


def stored_calibration(config: Any, settings: PlanSettings) -> Calibration | None:
    """The stored calibration of this device, type, width and training loop."""
    values = _read().get(calibration_key(config, settings))
    try:
        return None if values is None else Calibration(**values)
    except TypeError:
        return None  # of another form: measured again on demand


def calibration_key(config: Any, settings: PlanSettings) -> str:
    device = f"{platform.machine()} {torch.get_num_threads()} threads"
    if settings.device == "cuda":
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cuda"
    bits = _bits(settings)
    parts = [
        device,
        settings.dtype if bits is None else f"{settings.dtype} over {bits} bits",
        f"width {config.get_text_config().hidden_size}",
        "recomputed" if settings.gradient_checkpointing else "kept",
        "select" if settings.is_packed else f"peft, {settings.loss} loss",
    ]
    return " | ".join(parts)


def _bits(settings: PlanSettings) -> int | None:
    return 4 if settings.load_in_4bit else 8 if settings.load_in_8bit else None


def _step_factor(estimate: RankEstimate, measured_bytes: int) -> float:
    """Measured over traced bytes, without weights, adapter and optimizer states, which are exact."""
    persistent = sum(estimate.training.components.get(name, 0) for name in PERSISTENT)
    return max(0.0, measured_bytes - persistent) / (estimate.training.peak_bytes - persistent)


def _measure(config: Any, settings: PlanSettings, rank: int) -> _Measured:
    """The fastest step and forward pass, and the peak of tensors: by the allocator on CUDA, by the profiler elsewhere."""
    device = torch.device(settings.device)
    memory = PeakMemory(device)
    model = _built(config, settings)
    with without_peft_noise():
        adapted: Any = get_peft_model(model, lora_config(model, settings, rank))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=settings.optim == "adamw_fused")
    shape = (settings.batch_size, settings.seq_len)
    ids = torch.randint(0, config.get_text_config().vocab_size, shape, device=device)
    skeleton = Skeleton(adapted, (), ("default",))

    def step() -> None:
        torch.autograd.backward(_loss(adapted, model, ids, settings))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def forward() -> None:
        with torch.no_grad():
            _loss(adapted, model, ids, settings)

    with multi_lora_forward(skeleton, settings, settings.batch_size), training_mode(adapted, settings, True):
        step_seconds = _fastest(step, device)
        process = memory.peak_bytes()
        peak = _peak(step, device, adapted, optimizer)
    with multi_lora_forward(skeleton, settings, settings.batch_size), training_mode(adapted, settings, False):
        forward_seconds = _fastest(forward, device)
    process_bytes = max(0, process - peak) if device.type == "cpu" else None
    return _Measured(step_seconds, forward_seconds, peak, process_bytes)


def _built(config: Any, settings: PlanSettings) -> Any:
    """The reduced model with random weights on its device, quantised as transformers loads it."""
    auto: Any = AutoModelForCausalLM
    if settings.num_labels is not None:
        auto, config.num_labels = AutoModelForSequenceClassification, settings.num_labels
        text = config.get_text_config()
        text.pad_token_id = text.pad_token_id if text.pad_token_id is not None else text.vocab_size - 1
    dtype, bits = DTYPES[settings.dtype], _bits(settings)
    model = auto.from_config(config, dtype=dtype)
    if bits is None:
        return model.to(settings.device).requires_grad_(False)
    quiet_third_parties()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        how = {"quantization_config": quantisation(bits, settings.dtype), "device_map": {"": settings.device}}
        model = auto.from_pretrained(folder, dtype=dtype, **how)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # as on loading: that product has no gradient
    return model.requires_grad_(False)


def _fastest(run: Callable[[], None], device: torch.device) -> float:
    seconds = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])


def _peak(step: Callable[[], None], device: torch.device, adapted: Any, optimizer: Any) -> int:
    """The peak of tensor memory in one step, bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events: Any = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = highest = 0
    for _, change in changes:
        now += change
        highest = max(highest, now)
    return highest + _persistent_bytes(adapted, optimizer)


def _persistent_bytes(adapted: Any, optimizer: Any) -> int:
    states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    tensors = [*adapted.parameters(), *adapted.buffers(), *states]
    for module in adapted.modules():
        constants = getattr(getattr(module, "weight", None), "quant_state", None)
        if constants is not None:
            nested = constants.state2
            tensors += [constants.absmax, constants.code]
            tensors += [] if nested is None else [constants.offset, nested.absmax, nested.code]
        scales = getattr(getattr(module, "weight", None), "SCB", None)
        tensors += [] if scales is None else [scales]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _loss(adapted: Any, base: Any, ids: torch.Tensor, settings: PlanSettings) -> torch.Tensor:
    if settings.num_labels is not None:
        logits = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
        return F.cross_entropy(logits, torch.zeros(len(ids), dtype=torch.long, device=ids.device))
    if settings.loss == "full":
        loss: torch.Tensor = adapted(input_ids=ids, labels=ids, use_cache=False).loss
        return loss
    hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
    kept = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    return chunked_cross_entropy(kept, ids[:, 1:].reshape(-1), OutputHead(base), 1.0)[0].sum()


def _path() -> Path:
    return cache_folder() / "calibration.json"


def _read() -> dict[str, Any]:
    """The stored calibrations; empty where the file is missing or damaged, since they can be measured again."""
    try:
        known = json.loads(_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
