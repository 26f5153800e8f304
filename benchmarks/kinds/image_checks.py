"""The checks of `checks.py` for convolutions, which `select_rank_with` trains: a ResNet, and the U-Net of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from examples.text_to_image import TextToImageTrain
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from benchmarks.kinds.checks import TOLERANCE, peft_updates
from benchmarks.kinds.images import (
    UNET_TARGETS,
    ResNetTrain,
    captioned,
    classified,
    make_unet,
    save_pipeline,
    save_resnet,
    unet_output,
)
from rightrank import TrialTask, inspect, resize, select_rank_with
from rightrank.models.adapter_files import open_adapter

RANK, STEPS = 4, 3


def resnet(folder: Path) -> TextToImageTrain:
    return ResNetTrain(
        pipeline=str(save_resnet(folder / "resnet")),
        train_images=classified(32, 0),
        held_out=classified(12, 1),
    )


def unet(folder: Path) -> TextToImageTrain:
    return TextToImageTrain(
        pipeline=str(save_pipeline(folder / "diffusion")),
        train_images=captioned(8, 0),
        held_out=captioned(4, 1),
        timesteps=(100, 800),
        lora={"target_modules": UNET_TARGETS},
    )


IMAGES: dict[str, Callable[[Path], TextToImageTrain]] = {
    "convolutions (ResNet)": resnet,
    "convolutions (U-Net of diffusers)": unet,
}


def row_of(name: str, folder: Path) -> dict[str, str]:
    """One row of the table; AssertionError where a check does not hold."""
    train = IMAGES[name](folder)
    adapter = folder / "adapter"
    trained = train(_task(adapter, RANK))
    assert trained.item_scores is not None
    return {
        "kind": name,
        "equal to a PEFT loop": _largest(trained.item_scores, plain_scores(train)),
        "loaded by PEFT": _largest(train.evaluate(_task(adapter, RANK)).item_scores, trained.item_scores),
        "parameters": _counted(train, adapter, trained.trainable_parameters),
        "planned": "counted without weights; no peak",
        "inspected": _inspected(train, adapter),
        "resized": _resized(train, adapter, folder / "small"),
        "truncated in a run": _selected(train, folder / "run"),
        "resumed": "by trials",
        "shares a pass": "no: the trainer is the user's",
    }


def _task(folder: Path, rank: int) -> TrialTask:
    folder.mkdir(parents=True, exist_ok=True)
    return TrialTask(trial_id="t", rank=rank, learning_rate=1e-2, lora_alpha=8.0, seed=0, steps=STEPS, folder=folder)


def plain_scores(train: TextToImageTrain) -> list[float]:
    """Held-out losses after a plain loop over PEFT's model, with the same draws."""
    base, rows, losses = train.load()
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=8, **{**train.defaults, **train.lora})
    model: Any = get_peft_model(base, config).eval()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer, order = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        loss = losses(model, torch.randint(rows, (train.batch_size,), generator=order).tolist(), order).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return list(train.scored(model, losses).item_scores or [])


def _largest(found: list[float] | None, expected: list[float]) -> str:
    largest = float(np.max(np.abs(np.array(found) / np.array(expected) - 1)))
    assert largest <= TOLERANCE, largest
    return f"{largest:.0e}"


def _counted(train: TextToImageTrain, adapter: Path, trained: int) -> str:
    tensors = load_file(open_adapter(adapter).weights)
    stored = sum(value.numel() for key, value in tensors.items() if "lora_" in key)
    heads = sum(value.numel() for key, value in tensors.items() if "lora_" not in key)
    assert stored == open_adapter(adapter).trained == trained - heads
    return str(stored)


def _updates(train: TextToImageTrain, adapter: Path) -> dict[str, torch.Tensor]:
    return peft_updates(PeftModel.from_pretrained(train.load()[0], str(adapter)))


def _inspected(train: TextToImageTrain, adapter: Path) -> str:
    updates, largest = _updates(train, adapter), 0.0
    for module in inspect(adapter).modules:
        exact = torch.linalg.svdvals(updates[module.name])[: module.rank].numpy()
        largest = max(largest, float(np.max(np.abs(exact - module.singular_values[: len(exact)]))) / float(exact[0]))
    assert largest < 1e-5, largest
    return f"{largest:.0e}"


def _resized(train: TextToImageTrain, adapter: Path, out: Path) -> str:
    resized = resize(adapter, out, rank=1)
    before, after = _updates(train, adapter), _updates(train, out)
    error = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
    whole = sum(float(update.square().sum()) for update in before.values()) ** 0.5
    assert abs(error / whole - resized.relative_delta_error) < 1e-5
    return f"{resized.relative_delta_error:.3f}"


def _selected(train: TextToImageTrain, out: Path) -> str:
    """A selection truncates the adapter of the top, and hands one over; a U-Net's is loaded by PEFT."""
    selected = select_rank_with(
        train, out, evaluate=train.evaluate, ranks=(1, RANK), learning_rates=(1e-2,), max_steps=STEPS, metric="loss",
        strategy="grid", margin=0.5,
    )  # fmt: skip
    assert selected.adapter is not None
    if not isinstance(train, ResNetTrain):
        expected = unet_output(PeftModel.from_pretrained(make_unet(), str(selected.adapter.path)).eval())
        assert expected.isfinite().all()
    return "svd"
