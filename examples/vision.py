"""Select a rank for a vision transformer that learns the position of a bright square. Any model that PEFT adapts works the same way.

python examples/vision.py     (creates its images; uses transformers' ViT class with random weights)
"""

from __future__ import annotations

import torch
from common import parse_options
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from rightrank import TrialResult, TrialTask, select_rank_with

arguments = parse_options(needs_data=False)
SIDE, CLASSES = 32, 4


def make_images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw noise with a bright square in one of the four corners; the corner is the class."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    corners = torch.randint(CLASSES, (count,), generator=generator)
    for image, corner in zip(pixels, corners.tolist(), strict=True):
        row, column = (corner // 2) * 16, (corner % 2) * 16
        image[:, row + 4 : row + 12, column + 4 : column + 12] += 1.0
    return pixels, corners


held_out, training = make_images(200, seed=1), make_images(400, seed=2)


def train(task: TrialTask) -> TrialResult:
    torch.manual_seed(0)  # so that the base model is the same for every trial
    base = ViTForImageClassification(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=SIDE,
            patch_size=8,
            num_labels=CLASSES,
        )
    )
    torch.manual_seed(task.seed)
    config = LoraConfig(
        r=task.rank, lora_alpha=int(task.lora_alpha), target_modules="all-linear", modules_to_save=["classifier"]
    )
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=task.learning_rate)
    order = torch.Generator().manual_seed(task.seed)
    for _ in range(task.steps):
        indices = torch.randint(len(training[0]), (16,), generator=order)
        model(pixel_values=training[0][indices], labels=training[1][indices]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        predictions = model(pixel_values=held_out[0]).logits.argmax(-1)
    correct = (predictions == held_out[1]).float().tolist()
    model.save_pretrained(task.folder)
    return TrialResult(metrics={"accuracy": sum(correct) / len(correct)}, example_scores=correct)


if __name__ == "__main__":
    selected = select_rank_with(
        train,
        arguments.out,
        ranks=(1, 4, 16),
        learning_rates=(1e-3, 1e-2),
        max_steps=arguments.steps,
        metric="accuracy",
        margin=0.02,
    )
    print(selected.decision.sentence)
