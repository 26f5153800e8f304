"""A cut inside a training: the checkpoint of a higher rank becomes one of a lower rank, from which the same steps continue.

The adapter is truncated in the metric of its own last batches (`covariances.py`), or by its singular values alone. Progress,
batches and schedule stay; the optimizer's state starts afresh, or is projected on the factors that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig

from rightrank.models.adapter_files import save_adapter
from rightrank.models.truncation import POWERS, load_moments, projected_state, truncated_tensors
from rightrank.schema.trials import Arm
from rightrank.train.covariances import gather_recent_moments, write_moments
from rightrank.train.multi_lora import ADAPTER, MultiLora
from rightrank.train.runtime import Runtime

Tensors = Mapping[str, torch.Tensor]

HIGHER = "before_the_cut"  # an adapter's name
MEANS = ("exp_avg", "exp_avg_sq")  # of AdamW's state


def cut_checkpoint(
    runtime: Runtime,
    multi_lora: MultiLora,
    arm: Arm,
    config: LoraConfig,
    checkpoint: tuple[Tensors, Mapping[str, Any]],
    moments_file: Path,
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """`(tensors, notices)` of the checkpoint after the cut.

    Args:
        arm: with a cut; the training after it.
        config: of the arm; the rank of each module goes into it.
        checkpoint: tensors and state of the training that stopped at the cut.
        moments_file: where its moments are, once they have been gathered for one of its cuts.
    """
    tensors, state = checkpoint
    assert arm.cut is not None
    higher = runtime.config(arm.model_copy(update={"rank": arm.cut.rank, "cut": None}))
    higher.rank_pattern = state.get("rank_pattern") or {}
    named = multi_lora.add(HIGHER, arm, higher)
    try:
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensors[f"parameter.{name}"])
        notices: tuple[str, ...] = ()
        if arm.cut.by == "kfac" and not moments_file.exists():
            with multi_lora.alone(HIGHER):
                gathered = gather_recent_moments(runtime, multi_lora.peft_model, arm, HIGHER)
            write_moments(moments_file, gathered)
            notices = gathered.notices
        moments = load_moments(moments_file) if arm.cut.by == "kfac" else {}
        with TemporaryDirectory() as working:
            folder = Path(working) / "adapter"
            save_adapter(multi_lora.peft_model, folder, runtime.loaded.name, HIGHER)
            return _lower(
                arm, config, tensors, list(named), folder, truncated_tensors(folder, arm.rank, config, moments)
            ), notices
    finally:
        multi_lora.remove(HIGHER)


def _lower(
    arm: Arm, config: LoraConfig, tensors: Tensors, names: list[str], folder: Path, lower: Tensors
) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint at the lower rank: the parameters, and the optimizer's state where it is projected.

    Args:
        names: of the parameters, in the optimizer's order.
        folder: the adapter before the cut.
        lower: the adapter after it, by PEFT's names.
    """
    saved = {name: _saved_name(name, lower) for name in names}
    result = {f"parameter.{name}": lower[key] for name, key in saved.items()}
    if arm.cut is None or arm.cut.optimizer == "fresh":
        return result
    for key in MEANS:
        means = {saved[name]: tensors[f"optimizer.{index}.{key}"] for index, name in enumerate(names)}
        projected = projected_state(folder, config, lower, means, POWERS[key])
        result |= {f"optimizer.{index}.{key}": projected[saved[name]] for index, name in enumerate(names)}
    return result | {key: tensors[key] for key in tensors if key.startswith("optimizer.") and key.endswith(".step")}


def _saved_name(name: str, saved: Tensors) -> str:
    """The name in PEFT's file of a parameter of its only adapter."""
    plain = name.replace(f".modules_to_save.{ADAPTER}", "").replace(f".{ADAPTER}", "")
    return plain if plain in saved else plain.removesuffix(".weight")  # DoRA's magnitudes
