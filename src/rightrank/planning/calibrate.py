"""A few real steps on this device: what a floating-point operation takes here, and how far the trace is off.

Four groups of the model's blocks with random weights stand for the model: the same shapes, types and kernels in a
fraction of the memory. What was measured is kept in the user's cache folder, by device, type and width.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from platformdirs import user_cache_path
from transformers import AutoModelForCausalLM

from rightrank.engine.loss import chunked_cross_entropy, output_head
from rightrank.errors import SettingsError
from rightrank.io.files import write_text
from rightrank.io.models import DTYPES
from rightrank.io.reading import UnreadableError, read_json_object
from rightrank.planning.estimate import Estimator
from rightrank.planning.skeleton import lora_config
from rightrank.planning.stack import TRACED_GROUPS, reduced_config
from rightrank.settings import PlanSettings

STEPS = 4  # the first warms up


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured on one device."""

    key: str
    seconds_per_flop: float
    peak_ratio: float | None  # measured allocated peak over the traced one; None where the device does not count


def calibrate(config: Any, settings: PlanSettings) -> Calibration:
    """Run the steps and keep what they took.

    Raises:
        SettingsError: a device that is not here, or settings that are not measured.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            "calibrate needs the device that is planned for: there is no CUDA device here; give device cpu"
        )
    if settings.load_in_4bit or settings.load_in_8bit or settings.autocast or settings.arms > 1:
        raise SettingsError("calibrate measures plain weights: leave out 4-bit, 8-bit, autocast and arms")
    text = config.get_text_config()
    small = reduced_config(config, min(text.num_hidden_layers, TRACED_GROUPS))
    rank = min(settings.ranks)
    estimate = Estimator(small, settings.model_copy(update={"ranks": (rank,)})).estimate(rank)
    seconds, peak = _measure(small, settings, rank)
    ratio = None if peak is None else peak / estimate.training.peak_bytes
    found = Calibration(calibration_key(config, settings), seconds / estimate.flops, ratio)
    known = _read()
    known[found.key] = asdict(found)
    _path().parent.mkdir(parents=True, exist_ok=True)
    write_text(_path(), json.dumps(known, indent=1, sort_keys=True) + "\n")
    return found


def stored_calibration(config: Any, settings: PlanSettings) -> Calibration | None:
    """What was measured before for this device, type and width."""
    values = _read().get(calibration_key(config, settings))
    return None if values is None else Calibration(**values)


def calibration_key(config: Any, settings: PlanSettings) -> str:
    device = f"{platform.machine()} {torch.get_num_threads()} threads"
    if settings.device == "cuda":
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cuda"
    recomputed = "recomputed" if settings.gradient_checkpointing else "kept"
    return f"{device} | {settings.dtype} | width {config.get_text_config().hidden_size} | {recomputed}"


def _measure(config: Any, settings: PlanSettings, rank: int) -> tuple[float, int | None]:
    """Seconds of the fastest step, and the allocated peak on CUDA."""
    device = torch.device(settings.device)
    loader: Any = AutoModelForCausalLM.from_config  # untyped in transformers
    model = loader(config, dtype=DTYPES[settings.dtype]).to(device)
    adapted: Any = get_peft_model(model, lora_config(model, settings, rank))
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted.train()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    vocabulary = config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (settings.batch_size, settings.seq_len), device=device)
    seconds = []
    for step in range(STEPS):
        if step == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        _step(adapted, model, ids, settings)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    del adapted, model, optimizer, trained
    gc.collect()
    return min(seconds[1:]), peak


def _step(adapted: Any, base: Any, ids: torch.Tensor, settings: PlanSettings) -> None:
    if settings.loss == "full":
        loss: torch.Tensor = adapted(input_ids=ids, labels=ids, use_cache=False).loss
    else:
        hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
        kept = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        loss = chunked_cross_entropy(kept, ids[:, 1:].reshape(-1), output_head(base), 1.0)[0]
    torch.autograd.backward(loss)


def _path() -> Path:
    return user_cache_path("rightrank") / "calibration.json"


def _read() -> dict[str, Any]:
    """What is kept; nothing where the file is missing or damaged: it can be measured again."""
    try:
        return read_json_object(_path())
    except UnreadableError:
        return {}
