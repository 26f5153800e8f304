"""A vision transformer that learns where a bright square is. Any model that PEFT adapts works the same way.

python examples/vision.py     (makes its own images; ViT's real class, random weights)
"""

from __future__ import annotations

import torch
from common import options
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from rightrank import TrialResult, TrialTask, select_rank_with

arguments = options(needs_data=False)
SIDE, CLASSES = 32, 4


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright square in one of the four corners; the corner is the class."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    corners = torch.randint(CLASSES, (count,), generator=generator)
    for image, corner in zip(pixels, corners.tolist(), strict=True):
        top, left = (corner // 2) * 16, (corner % 2) * 16
        image[:, top + 4 : top + 12, left + 4 : left + 12] += 1.0
    return pixels, corners


held_out, training = images(200, seed=1), images(400, seed=2)


def train(task: TrialTask) -> TrialResult:
    torch.manual_seed(0)  # of the base: the same for every trial
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
        picked = torch.randint(len(training[0]), (16,), generator=order)
        model(pixel_values=training[0][picked], labels=training[1][picked]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        guesses = model(pixel_values=held_out[0]).logits.argmax(-1)
    right = (guesses == held_out[1]).float().tolist()
    model.save_pretrained(task.folder)
    return TrialResult(metrics={"accuracy": sum(right) / len(right)}, item_scores=right)


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
