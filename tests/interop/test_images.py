"""The `train` functions for images, on tiny random models: convolutions train, are truncated, exported and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from examples.text_to_image import TextToImageTrain
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from rightrank import TrialTask, inspect, resize, select_rank_with
from rightrank.models.adapter_reader import open_adapter
from tests.interop.images import (
    UNET_TARGETS,
    ResNetTrain,
    captioned,
    classified,
    make_unet,
    save_pipeline,
    save_resnet,
    unet_output,
)
from tests.models.kind_checks import peft_updates

pytestmark = pytest.mark.trains

CONVOLUTIONS: dict[str, Any] = {"target_modules": ["convolution"]}


def task(folder: Path, rank: int, steps: int = 3) -> TrialTask:
    folder.mkdir(parents=True, exist_ok=True)
    return TrialTask(trial_id="t", rank=rank, learning_rate=1e-2, lora_alpha=8.0, seed=0, steps=steps, folder=folder)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    return save_pipeline(tmp_path_factory.mktemp("diffusion"))


def text_to_image(pipeline: Path, **changes: Any) -> TextToImageTrain:
    return TextToImageTrain(
        pipeline=str(pipeline),
        train_images=captioned(8, 0),
        held_out=captioned(4, 1),
        timesteps=(100, 800),
        lora={"target_modules": UNET_TARGETS},
        **changes,
    )


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> ResNetTrain:
    folder = save_resnet(tmp_path_factory.mktemp("resnet"))
    return ResNetTrain(pipeline=str(folder), train_images=classified(32, 0), held_out=classified(12, 1))


def test_a_resnet_equals_a_plain_peft_loop(resnet: ResNetTrain, tmp_path: Path) -> None:
    """The loop anyone would write, over the same draws."""
    ours = resnet(task(tmp_path / "ours", 2))
    base, rows, losses = resnet.load()
    torch.manual_seed(0)
    model: Any = get_peft_model(
        base, LoraConfig(r=2, lora_alpha=8, modules_to_save=["classifier"], **CONVOLUTIONS)
    ).eval()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer, order = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0), torch.Generator().manual_seed(0)
    for _ in range(3):
        picked = torch.randint(rows, (4,), generator=order).tolist()
        pixels = torch.stack([resnet.train_images[index][0] for index in picked])
        labels = torch.tensor([resnet.train_images[index][1] for index in picked])
        model(pixel_values=pixels, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert losses(model, range(12)).tolist() == pytest.approx(ours.example_scores, rel=2e-5)
    assert ours.trainable_parameters == sum(one.numel() for one in trained)


def test_convolutions_of_a_resnet_are_counted_inspected_and_truncated(resnet: ResNetTrain, tmp_path: Path) -> None:
    trained = resnet(task(tmp_path / "r4", 4))
    assert resnet.evaluate(task(tmp_path / "r4", 4)).example_scores == pytest.approx(trained.example_scores, rel=2e-5)
    adapter = open_adapter(tmp_path / "r4")
    stored = sum(v.numel() for k, v in load_file(adapter.weights).items() if "lora_" in k)
    assert adapter.trained == stored
    assert {module.kind.name for module in adapter.modules} == {"convolution"}
    resized = resize(tmp_path / "r4", tmp_path / "r1", rank=1)
    before, after = (
        peft_updates(PeftModel.from_pretrained(resnet.load()[0], str(tmp_path / name))) for name in ("r4", "r1")
    )
    for module in inspect(tmp_path / "r4").modules:
        exact = torch.linalg.svdvals(before[module.name])[: module.rank]
        assert module.singular_values == pytest.approx(exact.tolist(), abs=1e-6)
    error = sum(float((after[name] - before[name]).square().sum()) for name in before) ** 0.5
    whole = sum(float(update.square().sum()) for update in before.values()) ** 0.5
    assert resized.relative_delta_error == pytest.approx(error / whole, rel=1e-4)


def test_a_selection_of_a_unet_hands_over_what_peft_loads(pipeline: Path, tmp_path: Path) -> None:
    train = text_to_image(pipeline)
    selected = select_rank_with(
        train, tmp_path / "run", evaluate=train.evaluate, ranks=(1, 4), learning_rates=(1e-2,), max_steps=3,
        metric="loss", strategy="grid", margin=0.5,
    )  # fmt: skip
    assert selected.adapter is not None
    unet = PeftModel.from_pretrained(make_unet(), str(selected.adapter.path)).eval()
    plain = make_unet()
    assert not torch.allclose(unet_output(unet), unet_output(plain), atol=1e-6)


def test_a_judge_decides_in_place_of_the_loss(pipeline: Path, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def judge(found: Any, captions: Any) -> list[float]:
        seen.append(list(captions))
        assert any("lora" in name for name, _ in found.unet.named_modules())
        return [1.0, 0.5, 0.0, 1.0]

    result = text_to_image(pipeline, judge=judge)(task(tmp_path / "judged", 2, steps=1))
    assert result.metrics["wins"] == 0.625
    assert result.example_scores == [1.0, 0.5, 0.0, 1.0]
    assert seen == [["red", "blue", "green", "grey"]]


def test_held_out_losses_are_the_same_in_every_trial(pipeline: Path, tmp_path: Path) -> None:
    train = text_to_image(pipeline)
    first, again = (train(task(tmp_path / name, 2, steps=0)) for name in ("a", "b"))
    assert first.example_scores == again.example_scores
    assert first.example_scores == pytest.approx(train(task(tmp_path / "c", 0)).example_scores, rel=1e-6)  # B = 0
