"""Preference pairs: the loss of DPO (Rafailov et al. 2023), whose reference is the base without an adapter.

    r(y) = log p(y | prompt) - log p_base(y | prompt)      summed over the tokens of an answer y
    loss = -log sigmoid(beta * (r(chosen) - r(rejected)))  nats a pair

The log-probabilities under the base depend on no adapter. They are computed once for each pair and kept, so that training
runs no second model and no second pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from rightrank.data.token_store import EncodedExample
from rightrank.schema.trials import SplitName
from rightrank.train.batches import Batch, FixedGroups
from rightrank.train.loss import BatchLoss, LabelLoss, Scale

TIE = 1e-5  # a reward margin below which a pair counts half, as every pair of the base does: rounding is no preference

LogProbabilities = Callable[[SplitName, Sequence[int]], torch.Tensor]


class PreferenceLoss:
    """The objective of preference pairs.

    Args:
        labels: gives the cross-entropies of the model's labels.
        beta: how strongly a step away from the base counts.
    """

    def __init__(self, labels: LabelLoss, beta: float) -> None:
        self._labels = labels
        self._beta = beta

    def __call__(self, model: Any, batch: Batch, scale: Scale) -> BatchLoss:
        """The loss of each of b pairs; `batch` holds 2b sequences and their reference [2b]."""
        assert batch.reference is not None
        found = self._labels(model, batch, 1.0)
        counts = torch.bincount(found.sequences, minlength=batch.sequences).tolist()
        # Summed one by one, because a sum over padded rows depends on the longest sequence of the batch.
        sums = torch.stack([part.sum() for part in torch.split(found.scaled, counts)])
        log_ratios = -sums - batch.reference.to(sums)
        chosen, rejected = log_ratios[0::2], log_ratios[1::2]
        margins = self._beta * (chosen - rejected)
        losses = -F.logsigmoid(margins)
        metrics = {
            "reward_accuracy": (1 + margins.sign() * (margins.abs() > TIE)) / 2,
            "reward_margin": margins,
            "chosen_log_ratio": chosen,
        }
        return BatchLoss(
            (losses * scale).sum(),
            losses.detach().cpu().double(),
            torch.ones(len(losses), dtype=torch.long),
            {name: values.detach().cpu().double() for name, values in metrics.items()},
        )


class Reference:
    """The log-probabilities of both answers of every pair under the base, computed once and kept in memory."""

    def __init__(
        self,
        splits: Mapping[SplitName, Sequence[EncodedExample]],
        expected: Mapping[SplitName, set[int]],
        group_size: int,
        compute: LogProbabilities,
    ) -> None:
        """Compute nothing yet.

        Args:
            splits: the pairs.
            expected: the indices of those that will be used.
            group_size: pairs computed together.
            compute: gives the log-probabilities [2b] of some pairs of a split.
        """
        self._compute = compute
        self._groups = {name: FixedGroups(pairs, expected[name], group_size) for name, pairs in splits.items()}
        self._values = {name: np.full((len(pairs), 2), np.nan) for name, pairs in splits.items()}

    def expect(self, split: SplitName, indices: Iterable[int]) -> None:
        """Group pairs that will be used, to compute them together."""
        self._groups[split].expect(indices)

    def fill(self, split: SplitName, wanted: Iterable[int]) -> Iterator[int]:
        """Compute what is missing for the pairs in `wanted`; yields the number of pairs in each group."""
        for group in self._groups[split].missing(wanted):
            self._values[split][group] = self._compute(split, group).view(-1, 2).numpy()
            yield len(group)

    def require(self, split: SplitName, wanted: Iterable[int]) -> None:
        """As `fill`, without progress."""
        deque(self.fill(split, wanted), maxlen=0)

    def of(self, split: SplitName, indices: Sequence[int]) -> torch.Tensor:
        """[2b], float64, on the CPU: chosen and rejected of each pair."""
        self.require(split, indices)
        return torch.from_numpy(self._values[split][list(indices)]).flatten()


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Within the block, PEFT's adapters on `model` add nothing."""
    active = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) and not module.disable_adapters
    ]
    for module in active:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module in active:
            module._disable_adapters = False
