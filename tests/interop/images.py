"""Small random models of images: a text-to-image pipeline of diffusers, and a ResNet of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from examples.text_to_image import TextToImageTrain

from rightrank.runs.calls import TrialResult

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


def unet_output(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    with torch.no_grad():
        found: torch.Tensor = unet(latents, torch.tensor([3, 700]), encoder_hidden_states=text).sample
    return found


def save_pipeline(folder: Path) -> Path:
    """A Stable Diffusion pipeline whose every part is random and tiny."""
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

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


def captioned(count: int, seed: int) -> list[tuple[torch.Tensor, str]]:
    """Noise in −1 … 1 with one channel that its caption raises."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        image = torch.rand(3, SIDE, SIDE, generator=generator) * 0.5 - 0.5
        image[number % 3] += 0.5
        rows.append((image, CAPTIONS[number % len(CAPTIONS)]))
    return rows


def save_resnet(folder: Path) -> Path:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=2)
    ResNetForImageClassification(config).save_pretrained(folder)
    return folder


def classified(count: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    """Noise with a bright half; which one is the class."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        image = torch.randn(3, SIDE, SIDE, generator=generator)
        image[:, :, (number % 2) * SIDE // 2 :][:, :, : SIDE // 2] += 1.0
        rows.append((image, number % 2))
    return rows


@dataclass(frozen=True, kw_only=True)
class ResNetTrain(TextToImageTrain):
    """The same training of a transformers image classifier, the folder `pipeline`, with its head trained whole."""

    held_out: Any
    train_images: Any

    _defaults: ClassVar[Mapping[str, Any]] = {"modules_to_save": ["classifier"], "target_modules": ["convolution"]}

    def load(self) -> tuple[Any, int, Any]:
        from transformers import AutoModelForImageClassification

        classes = 1 + max(label for _, label in (*self.train_images, *self.held_out))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = AutoModelForImageClassification.from_pretrained(
                self.pipeline, num_labels=classes, ignore_mismatched_sizes=True
            )
        base.requires_grad_(False).eval()

        def losses(model: Any, indices: Sequence[int], generator: torch.Generator | None = None) -> torch.Tensor:
            rows = self.held_out if generator is None else self.train_images
            pixels = torch.stack([rows[index][0] for index in indices])
            labels = torch.tensor([rows[index][1] for index in indices])
            return F.cross_entropy(model(pixel_values=pixels).logits, labels, reduction="none")

        return base, len(self.train_images), losses

    @torch.no_grad()
    def scored(self, model: Any, losses: Any) -> TrialResult:
        found = losses(model, range(len(self.held_out))).tolist()
        return TrialResult(metrics={"loss": sum(found) / len(found)}, example_scores=found)
