"""Train a text-to-image LoRA with diffusers (`pip install diffusers`), as a `train` function for `select_rank_with`.

It freezes the pipeline, trains the adapter of its U-Net with AdamW in evaluation mode, saves it in PEFT's format, and scores every
held-out image. `evaluate` scores a saved adapter, so that truncations are candidates too::

    train = TextToImageTrain(pipeline="sd-1.5", train_images=pairs, held_out=others)
    select_rank_with(train, "run", evaluate=train.evaluate, metric="loss", max_steps=500, ranks=(4, 16, 64))

The loss of a diffusion model does not track how its images look. If you pass `judge`, its scores decide instead: it can be a person
or a model, and returns a number for each held-out image, such as 1, ½ or 0 for a win, a tie or a loss against a fixed image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model

from rightrank import TrialResult, TrialTask

Pixels = torch.Tensor  # [3, height, width]
Judge = Callable[[Any, Sequence[str]], list[float]]


@dataclass(frozen=True, kw_only=True)
class TextToImageTrain:
    """A LoRA of a diffusion pipeline's U-Net on images with captions. Rank 0 is the base model, which is scored but not trained."""

    _defaults: ClassVar[Mapping[str, Any]] = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}

    pipeline: str
    """Folder or hub name of a pipeline with a U-Net, such as Stable Diffusion 1.5."""
    train_images: Sequence[tuple[Pixels, str]]
    """Images in −1 … 1, and their captions."""
    held_out: Sequence[tuple[Pixels, str]]
    timesteps: Sequence[int] = (100, 300, 500, 700, 900)
    """Timesteps at which a held-out image is noised. Each has its own noise, which is the same in every trial."""
    judge: Judge | None = None
    """Scores the pipeline with the adapter on the held-out captions, as metric `wins`, which then decides instead of the loss."""
    batch_size: int = 4
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Extra settings of `LoraConfig`, such as `target_modules`."""

    def __call__(self, task: TrialTask) -> TrialResult:
        """Train the task, save the adapter in its folder, and score the held-out images."""
        base, num_images, losses = self.load_examples()
        if task.rank == 0:
            return self.score_held_out(base, losses)
        torch.manual_seed(task.seed)
        model = get_peft_model(base, self.build_config(task)).eval()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=0.0)
        order = torch.Generator().manual_seed(task.seed)
        for _ in range(task.steps):
            indices = torch.randint(num_images, (self.batch_size,), generator=order).tolist()
            torch.autograd.backward(losses(model, indices, order).mean())
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(str(task.folder))
        result = self.score_held_out(model, losses)
        return result.model_copy(update={"trainable_parameters": sum(parameter.numel() for parameter in parameters)})

    def evaluate(self, task: TrialTask) -> TrialResult:
        """Score the adapter in the task's folder."""
        base, _, losses = self.load_examples()
        return self.score_held_out(PeftModel.from_pretrained(base, str(task.folder)).eval(), losses)

    def build_config(self, task: TrialTask) -> LoraConfig:
        """Return PEFT's configuration of the task."""
        alpha: Any = task.lora_alpha
        return LoraConfig(**{"r": task.rank, "lora_alpha": alpha, **self._defaults, **self.lora})

    def load_examples(self) -> tuple[Any, int, Callable[..., torch.Tensor]]:
        """Return the frozen base model, the number of training images, and `losses(model, indices, generator)`.

        With a generator, `losses` returns the losses of training images, whose noise and timesteps the generator draws. Without one, it
        returns the losses of held-out images, which are deterministic.
        """
        pipeline = self._load_pipeline()
        training, held_out = (_encode(pipeline, rows) for rows in (self.train_images, self.held_out))
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)

        def losses(model: Any, indices: Sequence[int], generator: torch.Generator | None = None) -> torch.Tensor:
            latents, text = (tensors[list(indices)] for tensors in (held_out if generator is None else training))
            if generator is not None:
                steps = torch.randint(scheduler.config.num_train_timesteps, (len(indices),), generator=generator)
                return _compute_denoising_losses(model, scheduler, latents, text, steps, generator)
            draws = torch.Generator().manual_seed(indices[0])
            timesteps = [torch.full((len(indices),), step) for step in self.timesteps]
            return torch.stack(
                [_compute_denoising_losses(model, scheduler, latents, text, tensors, draws) for tensors in timesteps]
            ).mean(0)

        return pipeline.unet, len(self.train_images), losses

    @torch.no_grad()
    def score_held_out(self, model: Any, losses: Callable[..., torch.Tensor]) -> TrialResult:
        losses_by_image = [float(losses(model, [index])) for index in range(len(self.held_out))]
        metrics, scores = {"loss": sum(losses_by_image) / len(losses_by_image)}, losses_by_image
        if self.judge is not None:
            pipeline = self._load_pipeline()
            pipeline.unet = model.get_base_model() if isinstance(model, PeftModel) else model
            scores = self.judge(pipeline, [caption for _, caption in self.held_out])
            metrics["wins"] = sum(scores) / len(scores)
        return TrialResult(metrics=metrics, example_scores=scores)

    def _load_pipeline(self) -> Any:
        pipeline = DiffusionPipeline.from_pretrained(self.pipeline, safety_checker=None)
        for component in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            component.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


@torch.no_grad()
def _encode(pipeline: Any, rows: Sequence[tuple[Pixels, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the images' latents and the captions' embeddings once, since both encoders are frozen."""
    pixels, captions = torch.stack([image for image, _ in rows]), [caption for _, caption in rows]
    latents = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
    tokens = pipeline.tokenizer(
        captions,
        padding="max_length",
        truncation=True,
        max_length=pipeline.tokenizer.model_max_length,
        return_tensors="pt",
    )
    return latents, pipeline.text_encoder(tokens.input_ids)[0]


def _compute_denoising_losses(
    model: Any,
    scheduler: Any,
    latents: torch.Tensor,
    text: torch.Tensor,
    steps: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Return the mean squared error of each image [b] at its timestep, with noise from `generator`."""
    noise = torch.randn(latents.shape, generator=generator)
    noised = scheduler.add_noise(latents, noise, steps)
    target = noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, steps)
    predicted = model(noised, steps, encoder_hidden_states=text).sample
    return F.mse_loss(predicted, target, reduction="none").mean(dim=(1, 2, 3))
