"""Test the `train` functions for images on tiny random models: convolutions are trained, truncated, exported and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from examples.text_to_image import TextToImageTrain
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)

from rightrank import inspect, resize, select_rank_with
from rightrank.adapters.adapter_files import open_adapter
from tests.adapters.kind_checks import compute_peft_updates

pytestmark = pytest.mark.trains

SIDE = 16  # pixels
CAPTIONS = ("red", "blue", "green", "grey")
# Of the U-Net: attention, and convolutions of a kernel of one and of three.
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv2", "conv_in"]


def make_unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def compute_unet_output(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    with torch.no_grad():
        output: torch.Tensor = unet(latents, torch.tensor([3, 700]), encoder_hidden_states=text).sample
    return output


def save_pipeline(folder: Path) -> Path:
    """Save a tiny random Stable Diffusion pipeline."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline

    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    letters = list("abcdefghijklmnopqrstuvwxyz")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate([*words, *letters])}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=SIDE,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=make_unet(), scheduler=DDPMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


def make_captioned_images(count: int, seed: int) -> list[tuple[torch.Tensor, str]]:
    """Make noise between −1 and 1, with one channel that the caption raises."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        image = torch.rand(3, SIDE, SIDE, generator=generator) * 0.5 - 0.5
        image[number % 3] += 0.5
        rows.append((image, CAPTIONS[number % len(CAPTIONS)]))
    return rows


def save_resnet(folder: Path) -> Path:

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    return save_pipeline(tmp_path_factory.mktemp("diffusion"))


def make_text_to_image(pipeline: Path, **changes: Any) -> TextToImageTrain:
    return TextToImageTrain(
        pipeline=str(pipeline),
        train_images=make_captioned_images(8, 0),
        held_out=make_captioned_images(4, 1),
        timesteps=(100, 800),
        lora={"target_modules": UNET_TARGETS},
        **changes,
    )


def test_convolutions_of_a_resnet_are_counted_inspected_and_truncated(tmp_path: Path) -> None:
    base = save_resnet(tmp_path / "base")

    def load_base() -> Any:
        return AutoModelForImageClassification.from_pretrained(base)

    config = LoraConfig(r=4, target_modules=["convolution"], modules_to_save=["classifier"], init_lora_weights=False)
    get_peft_model(load_base(), config).save_pretrained(str(tmp_path / "r4"))
    adapter = open_adapter(tmp_path / "r4")
    stored = sum(v.numel() for k, v in load_file(adapter.weights_file).items() if "lora_" in k)
    assert adapter.trainable_parameters == stored
    assert {module.kind for module in adapter.modules} == {"convolution"}
    resized = resize(tmp_path / "r4", tmp_path / "r1", rank=1)
    original_updates, truncated_updates = (
        compute_peft_updates(PeftModel.from_pretrained(load_base(), str(tmp_path / name))) for name in ("r4", "r1")
    )
    for module in inspect(tmp_path / "r4").modules:
        exact = torch.linalg.svdvals(original_updates[module.name])[: module.rank]
        assert module.singular_values == pytest.approx(exact.tolist(), rel=1e-5)
    error = (
        sum(float((truncated_updates[name] - original_updates[name]).square().sum()) for name in original_updates)
        ** 0.5
    )
    norm = sum(float(update.square().sum()) for update in original_updates.values()) ** 0.5
    assert resized.relative_delta_error == pytest.approx(error / norm, rel=1e-4)


def test_a_selection_of_a_unet_hands_over_what_peft_loads(pipeline: Path, tmp_path: Path) -> None:
    train = make_text_to_image(pipeline)
    selected = select_rank_with(
        train, tmp_path / "run", evaluate=train.evaluate, ranks=(1, 4), learning_rates=(1e-2,), max_steps=3,
        metric="loss", strategy="grid", margin=0.5,
    )  # fmt: skip
    unet = PeftModel.from_pretrained(make_unet(), str(selected.adapter.path)).eval()
    plain = make_unet()
    assert not torch.allclose(compute_unet_output(unet), compute_unet_output(plain), atol=1e-6)
