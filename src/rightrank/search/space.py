"""The space that a strategy searches, with its budget: the part of the settings that strategies need."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from rightrank.decision.metrics import MetricKind, default_margin, kind_of
from rightrank.schema.errors import SettingsError
from rightrank.schema.settings import Goal, SelectSettings
from rightrank.schema.trials import Arm

RECOVERY_PART = 0.2  # of a training
MIN_RECOVERY_PART = 0.05
RECOVERY_LR_FACTOR = 0.1  # of the learning rate that the adapter was trained at: .3 made the adapter worse


@dataclass(frozen=True, slots=True)
class Space:
    """The space of a selection. Ranks and learning rates ascend."""

    ranks: tuple[int, ...]
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    lora_alpha: float
    steps: int  # of a whole training
    margin: float | None  # None: by the kind of metric
    metric: str = "loss"
    kind: MetricKind = "loss"
    higher_is_better: bool = False
    points_are_losses: bool = False  # whether evaluations during training measure the loss instead of the metric
    evaluates_base: bool = True  # False: no trial of rank 0, and nothing is compared with the base
    goal: Goal = "training-rank"
    stages: bool = True  # whether trainings can stop early and resume; False for custom trainers
    truncates: bool = True  # whether adapters can be truncated and evaluated
    recovery_steps: int = 0  # of training after truncation, on examples that were not trained on; 0: none are left
    trusts_values: bool = False  # whether values without scores by example can show that a truncation holds (tables)
    budget_steps: float | None = None  # optimizer steps over all arms
    budget_seconds: float | None = None  # of training and evaluation, over all arms
    start_rank: int = 0  # the smallest rank that a climb from below starts at; see `start`

    @property
    def start(self) -> int:
        """The first rank of a climb: the smallest of at least `start_rank`, the top where there is none."""
        return next((rank for rank in self.ranks if rank >= self.start_rank), self.top)

    @property
    def top(self) -> int:
        return self.ranks[-1]

    def arm(self, rank: int, learning_rate: float, seed: int | None = None) -> Arm:
        """A whole training. `seed` defaults to the first."""
        return Arm(
            rank=rank,
            learning_rate=learning_rate,
            lora_alpha=self.lora_alpha,
            seed=self.seeds[0] if seed is None else seed,
            steps=self.steps,
        )

    def margin_at(self, reference_loss: float) -> float:
        if self.margin is not None:
            return self.margin
        return default_margin(self.kind, abs(reference_loss), [abs(reference_loss)])

    @property
    def truncated_ranks(self) -> list[int]:
        """The ranks that the top adapter is truncated to, descending: lower ranks of the space and powers of two."""
        powers = {2**power for power in range(self.top.bit_length())}
        return sorted((rank for rank in powers | set(self.ranks) if rank < self.top), reverse=True)

    def below(self, rank: int) -> int | None:
        """The next lower rank, None at the bottom."""
        return next((low for low, high in pairwise(self.ranks) if high == rank), None)

    def a_quarter_of_the_top(self) -> int:
        """The highest rank of at most a quarter of the top; the lowest where there is none."""
        return max((rank for rank in self.ranks if rank <= self.top / 4), default=self.ranks[0])

    def above(self, rank: int) -> int | None:
        """The next higher rank, None at the top."""
        return next((high for low, high in pairwise(self.ranks) if low == rank), None)


def base_arm(lora_alpha: float) -> Arm:
    """Rank 0: the base without an adapter. It is evaluated once and is a point of every curve."""
    return Arm(rank=0, learning_rate=0.0, lora_alpha=lora_alpha, seed=0, steps=0)


def space_of(settings: SelectSettings, steps: int, token_loss: bool = True, unseen_steps: int = 0) -> Space:
    """The space of a selection with trainings of `steps` steps.

    `unseen_steps` is how many more steps the training examples last that no training sees.

    Raises:
        SettingsError: one rank alone where ranks are to be compared.
    """
    if len(settings.ranks) < 2 and settings.goal == "training-rank":
        raise SettingsError(
            f"ranks: got {settings.ranks[0]} alone; a comparison needs two or more, such as {settings.ranks[0]},"
            f"{4 * settings.ranks[0]}"
        )
    name = settings.metric_name
    higher = settings.is_higher_better(name)
    kind: MetricKind = "loss" if name == "loss" and not token_loss else kind_of(name, higher)
    trainings, optimizer_steps = settings.budget_trainings, settings.budget_steps
    budgets = [] if trainings is None else [trainings * steps]
    budgets += [] if optimizer_steps is None else [float(optimizer_steps)]  # the tighter one counts
    return Space(
        ranks=settings.ranks,
        learning_rates=settings.learning_rates,
        seeds=settings.seeds,
        lora_alpha=settings.lora_alpha,
        steps=steps,
        goal=settings.goal,
        recovery_steps=recovery_steps(steps, unseen_steps),
        margin=settings.margin,
        metric=name,
        kind=kind,
        higher_is_better=higher,
        points_are_losses=settings.points_metric != name,
        budget_steps=min(budgets, default=None),
        budget_seconds=None if settings.budget_hours is None else settings.budget_hours * 3600,
    )


def recovery_steps(steps: int, unseen_steps: int) -> int:
    """`RECOVERY_PART` of a training, or what the unseen examples last; 0 where that is too little to recover anything."""
    found = min(round(RECOVERY_PART * steps), unseen_steps)
    return found if found >= MIN_RECOVERY_PART * steps else 0
