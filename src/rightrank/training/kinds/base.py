"""The interface of adapter kinds: what a kind implements so that its adapters are trained and counted.

PEFT creates every adapter and saves it, and `adapters.kinds` describes the saved tensors. A kind is one class and one entry in
`rightrank.training.kinds.KINDS`; the first kind in that list that claims a module describes it.

An implementation must keep two promises. `initialize` leaves the function of the base model unchanged, and an adapter of rank r starts
with the first r rows of the draw of a larger one. `forward` computes for the rows of an adapter what PEFT's forward pass computes for them.

Example: a kind whose adapters are trained one at a time through PEFT's own forward pass::

    class Rotated(AdapterKind):
        label = "a rotated adapter"
        unshared_reason = "its rotation mixes all inputs of a layer"

        def can_adapt(self, module: Any) -> bool:
            return type(module).__name__ == "RotatedLinear"

A `Routing` says which rows of a batch belong to which adapter.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from rightrank.schema.errors import MultiLoraError


@dataclass(frozen=True, slots=True)
class RowSpan:
    """The rows of one arm in a layer's flattened input."""

    adapter: str
    rows: int
    dropout_seed: int | None  # None: no dropout
    solo_rows: int  # number of rows if the arm trains alone, for which the dropout mask is drawn
    solo_index: torch.Tensor | None  # [rows], the index of each row among them; None: the same rows


@dataclass(slots=True)
class Routing:
    """The rows of each adapter in the current batch, for every number of rows that a layer may see."""

    adapters: tuple[str, ...]
    dropout_seeds: tuple[int | None, ...]
    layouts: dict[int, list[RowSpan]] = field(default_factory=dict)  # by the number of rows of the flattened input

    @classmethod
    def from_packed(cls, adapters: Sequence[str], seeds: Sequence[int | None], tokens: Sequence[int]) -> Routing:
        """Create the routing of packed sequences: arms of `tokens[i]` tokens, one after the other in one row."""
        spans = [
            RowSpan(name, count, seed, count, None) for name, seed, count in zip(adapters, seeds, tokens, strict=True)
        ]
        return cls(tuple(adapters), tuple(seeds), {sum(tokens): spans})

    @classmethod
    def from_padded(
        cls, adapters: Sequence[str], seeds: Sequence[int | None], rows: Sequence[int], lengths: Sequence[int]
    ) -> Routing:
        """Create the routing of padded batches: arms of `rows[i]` examples of length `lengths[i]`, all padded to the longest length."""
        routing = cls(tuple(adapters), tuple(seeds))
        longest = max(lengths)
        by_example = [
            RowSpan(name, count, seed, count, None) for name, seed, count in zip(adapters, seeds, rows, strict=True)
        ]
        by_token: list[RowSpan] = []
        for name, seed, count, length in zip(adapters, seeds, rows, lengths, strict=True):
            index = None
            if length < longest:  # the row of each position in the unpadded layout; padding may take any row
                columns = torch.arange(longest).clamp(max=length - 1)
                index = (torch.arange(count)[:, None] * length + columns).reshape(-1)
            by_token.append(RowSpan(name, count * longest, seed, count * length, index))
        routing.layouts = {sum(rows): by_example, sum(rows) * longest: by_token}
        return routing

    def find_spans(self, rows: int) -> list[RowSpan]:
        """Return the span of each arm in a flattened input of `rows` rows.

        Raises:
            MultiLoraError: There is more than one arm, and `rows` is the number neither of the batch's examples nor of its tokens.
        """
        spans = self.layouts.get(rows)
        if spans is not None:
            return spans
        if len(self.adapters) == 1:
            return [RowSpan(self.adapters[0], rows, self.dropout_seeds[0], rows, None)]
        raise MultiLoraError(f"a layer sees {rows} rows that can't be assigned to arms")

    @contextmanager
    def restrict_rows(self, mask: torch.Tensor) -> Iterator[None]:
        """Let layers within the block also see only the rows of the flattened batch that `mask` [b·n] selects."""
        by_token = self.layouts[mask.numel()]
        spans: list[RowSpan] = []
        begin = 0
        for span in by_token:
            chosen = mask[begin : begin + span.rows].nonzero()[:, 0]
            begin += span.rows
            index = chosen if span.solo_index is None else span.solo_index.to(chosen.device)[chosen]
            spans.append(RowSpan(span.adapter, len(chosen), span.dropout_seed, span.solo_rows, index))
        total = sum(span.rows for span in spans)
        previous_layouts = self.layouts
        self.layouts = previous_layouts | {total: spans}
        try:
            yield
        finally:
            self.layouts = previous_layouts


CurrentRouting = Callable[[], Routing | None]


@dataclass(frozen=True, slots=True)
class InitialDraw:
    """The random numbers that an adapter starts from, a function of the arm's seed and the module's name."""

    seed: int
    module: str
    init: str  # the value of `init_lora_weights`

    def draw_rows(self, rank: int, width: int, *index: int) -> torch.Tensor:
        """Draw [rank, width] in float32, uniform in ±1/√width or normal with standard deviation 1/rank.

        Rows are drawn one after the other, so a lower rank gets the first rows. `index` numbers the matrices of a module.
        """
        generator = self._make_generator(*index)
        if self.init == "gaussian":
            return torch.from_numpy(generator.standard_normal((rank, width)) / rank).float()
        bound = 1 / math.sqrt(width)
        return torch.from_numpy(generator.uniform(-bound, bound, (rank, width))).float()

    def draw_normal(self, rank: int, width: int) -> torch.Tensor:
        """Draw [rank, width] in float64 from a standard normal; a lower rank gets the first rows."""
        return torch.from_numpy(self._make_generator().standard_normal((rank, width)))

    def _make_generator(self, *index: int) -> np.random.Generator:
        digest = hashlib.sha256(self.module.encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "big"), *index])


class AdapterKind(ABC):
    """One way in which PEFT adapts a layer. The defaults describe s·B·A with matrices A and B."""

    label: ClassVar[str]  # in messages, with its article: "a convolution"
    unshared_reason: ClassVar[str | None] = None  # why two adapters can't share a pass; None if they can
    unselectable_reason: ClassVar[str | None] = None  # why `select`, which trains text models, can't train it
    untruncatable_reason: ClassVar[str | None] = None  # why an adapter can't be truncated to a lower rank

    @abstractmethod
    def can_adapt(self, module: Any) -> bool:
        """Return whether PEFT's layer `module` (a `LoraLayer`) carries adapters of this kind."""

    def get_shapes(self, module: Any) -> list[tuple[str, int, int]]:
        """Return `(suffix of the module's name, rows, columns)` of each matrix ΔW; the suffix is empty for a single one."""
        return [("", int(module.out_features), int(module.in_features))]

    def initialize(self, module: Any, adapter: str, draw: InitialDraw) -> None:
        """Set the adapter's tensors to their initial values."""
        a = module.lora_A[adapter].weight
        a.copy_(draw.draw_rows(a.shape[0], a[0].numel()).view_as(a).to(a))
        module.lora_B[adapter].weight.zero_()

    def forward(self, module: Any, routing: CurrentRouting, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass in place of the module's own: each row with the tensors of its adapter.

        The default runs PEFT's own pass with the only adapter of the batch, or that of the base layer without a routing.
        """
        current = routing()
        if current is None:
            return module.base_layer(*args, **kwargs)
        if len(current.adapters) > 1:
            raise MultiLoraError(f"{self.label} trains alone, through PEFT's own forward pass")
        with _enable_dropout(module, current.adapters[0], current.dropout_seeds[0]):
            return type(module).forward(module, *args, **kwargs)


@contextmanager
def set_training_mode(value: bool, modules: Iterable[Any]) -> Iterator[None]:
    """Set the training mode of these modules alone within the block, and the opposite mode after it."""
    module_list = list(modules)
    for module in module_list:
        module.training = value
    try:
        yield
    finally:
        for module in module_list:
            module.training = not value


@contextmanager
def _enable_dropout(module: Any, adapter: str, seed: int | None) -> Iterator[None]:
    """Put PEFT's layer in training mode within the block, with dropout drawn from the seed and the layer; do nothing if the seed is None.

    The layers inside keep their mode. Gradient checkpointing computes a layer again and draws the same mask.
    """
    if seed is None:
        yield
        return
    layers = [module]
    if adapter in module.lora_dropout and isinstance(module.lora_dropout[adapter], torch.nn.Dropout):
        layers.append(module.lora_dropout[adapter])
    draws = len(layers) > 1
    with torch.random.fork_rng(enabled=draws):
        if draws:
            torch.manual_seed((seed * 0x9E3779B1 + module.rightrank_salt) % 2**63)
        with set_training_mode(True, [layer for layer in layers if not layer.training]):
            yield
