"""What a trial starts from and where its files go, and the start of an arm that truncates a trained adapter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig

from rightrank.exports.servers import max_module_rank
from rightrank.io.patterns import exact_pattern, lora_scaling, pattern_value
from rightrank.io.truncation import load_moments, module_ranks, truncated_tensors
from rightrank.maths.scaling import lora_scale
from rightrank.maths.truncation import Moments
from rightrank.records import Arm
from rightrank.settings import Scaling


@dataclass(frozen=True, slots=True)
class TrialFolders:
    checkpoint: Path  # file, while the trial runs
    adapter: Path  # folder, when it has finished
    continue_from: Path | None = None  # the checkpoint of the trial that this one resumes
    truncate_from: Path | None = None  # the adapter folder of the trial that this one truncates
    moments: Path | None = None  # file of the moments of that adapter (`engine.covariances`)
    answers: Path | None = None  # file for the model's answers to the held-out examples, if a metric needs them


def truncation_method(folders: TrialFolders) -> Literal["svd", "kfac"] | None:
    """The method that the adapter was truncated by; None if it was not."""
    if folders.truncate_from is None:
        return None
    return "kfac" if _moments(folders) else "svd"


def truncate(folders: TrialFolders, arm: Arm, scaling: Scaling, config: LoraConfig) -> dict[str, torch.Tensor]:
    """The tensors of a truncation, whose ranks go into `config`; none for an arm that starts from its first draw."""
    if folders.truncate_from is None:
        return {}
    scale, moments = partial(lora_scale, scaling, arm.lora_alpha), _moments(folders)
    uniform, alphas = dict(config.rank_pattern or {}), config.alpha_pattern or {}

    def rank_of(address: str) -> int:
        return int(pattern_value(uniform, address, config.r))

    def new_scale(address: str, rank: int) -> float:
        alpha = pattern_value(alphas, address, config.lora_alpha)
        return lora_scaling(alpha, rank, bool(config.use_rslora))

    ranks = module_ranks(folders.truncate_from, rank_of, max_module_rank(arm.rank), scale, moments)
    config.rank_pattern = exact_pattern(ranks, config.r, ranks)
    return truncated_tensors(folders.truncate_from, ranks, scale, new_scale, moments)


def _moments(folders: TrialFolders) -> dict[str, Moments]:
    """Those of the adapter to truncate, by module; none where they could not be gathered."""
    return {} if folders.moments is None else load_moments(folders.moments)
