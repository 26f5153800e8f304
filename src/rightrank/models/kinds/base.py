"""The seam of adapter kinds: what a kind must say so that its adapters train, are counted, truncated, inspected and saved.

PEFT creates every adapter and saves it. A kind describes one way in which PEFT adapts a layer: as a live module while the
adapter trains, and as a pair of tensors in `adapter_model.safetensors`. A kind is one class and one line in
`rightrank.models.kinds.KINDS`; the first kind in that list that claims a module or a pair describes it.

An implementer keeps three promises. `start` leaves the base's function unchanged, and an adapter of rank r begins with the
first r rows of the draw of a larger one. `forward` gives the rows of an adapter what PEFT's forward pass gives them.
`matrices` and `tensors` are inverse to each other, and the sum of squared differences of the matrices s·B·A is that of the
weights' updates.

Example: a kind whose adapters train alone through PEFT's own forward pass::

    class Rotated(AdapterKind):
        name = "linear"
        label = "a rotated adapter"
        why_alone = "its rotation mixes all inputs of a layer"

        def adapts(self, module: Any) -> bool:
            return type(module).__name__ == "RotatedLinear"

Routing: which rows of a batch belong to which adapter.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    alone_rows: int  # rows that the arm's input has when it trains alone, for which dropout is drawn
    alone_index: torch.Tensor | None  # [rows], the row among those; None: the same rows


@dataclass(slots=True)
class Routing:
    """The part of each adapter in the current batch, for every number of rows that a layer may see."""

    adapters: tuple[str, ...]
    dropout_seeds: tuple[int | None, ...]
    layouts: dict[int, list[RowSpan]] = field(default_factory=dict)  # by the number of rows of the flattened input

    @classmethod
    def packed(cls, adapters: Sequence[str], seeds: Sequence[int | None], tokens: Sequence[int]) -> Routing:
        """Packed sequences: arms of `tokens[i]` tokens, one after the other in one row."""
        parts = [
            RowSpan(name, count, seed, count, None) for name, seed, count in zip(adapters, seeds, tokens, strict=True)
        ]
        return cls(tuple(adapters), tuple(seeds), {sum(tokens): parts})

    @classmethod
    def padded(
        cls, adapters: Sequence[str], seeds: Sequence[int | None], rows: Sequence[int], lengths: Sequence[int]
    ) -> Routing:
        """Padded batches: arms of `rows[i]` examples of length `lengths[i]`, all padded to the longest length."""
        routing = cls(tuple(adapters), tuple(seeds))
        longest = max(lengths)
        by_example = [
            RowSpan(name, count, seed, count, None) for name, seed, count in zip(adapters, seeds, rows, strict=True)
        ]
        by_token: list[RowSpan] = []
        for name, seed, count, length in zip(adapters, seeds, rows, lengths, strict=True):
            index = None
            if length < longest:  # the row of each position in the unpadded layout; padding takes any row
                columns = torch.arange(longest).clamp(max=length - 1)
                index = (torch.arange(count)[:, None] * length + columns).reshape(-1)
            by_token.append(RowSpan(name, count * longest, seed, count * length, index))
        routing.layouts = {sum(rows): by_example, sum(rows) * longest: by_token}
        return routing

    def parts(self, rows: int) -> list[RowSpan]:
        """The arms' parts of a flattened input of `rows` rows.

        Raises:
            MultiLoraError: there is more than one arm, and the rows are neither the batch's examples nor its tokens.
        """
        parts = self.layouts.get(rows)
        if parts is not None:
            return parts
        if len(self.adapters) == 1:
            return [RowSpan(self.adapters[0], rows, self.dropout_seeds[0], rows, None)]
        raise MultiLoraError(f"a layer sees {rows} rows that can't be assigned to arms")

    @contextmanager
    def only_rows(self, keep: torch.Tensor) -> Iterator[None]:
        """Within the block, layers may also see only the rows of the flattened batch that `keep` [b·n] marks."""
        by_token = self.layouts[keep.numel()]
        parts: list[RowSpan] = []
        begin = 0
        for part in by_token:
            chosen = keep[begin : begin + part.rows].nonzero()[:, 0]
            begin += part.rows
            index = chosen if part.alone_index is None else part.alone_index.to(chosen.device)[chosen]
            parts.append(RowSpan(part.adapter, len(chosen), part.dropout_seed, part.alone_rows, index))
        total = sum(part.rows for part in parts)
        before = self.layouts
        self.layouts = before | {total: parts}
        try:
            yield
        finally:
            self.layouts = before


CurrentRouting = Callable[[], Routing | None]
Factors = tuple[Any, Any]  # B [rows, r] and A [r, columns], as torch or numpy arrays


@dataclass(frozen=True, slots=True)
class InitialDraw:
    """The numbers that an adapter starts from, a function of the arm's seed and the module's name."""

    seed: int
    module: str
    init: str  # of `init_lora_weights`
    top: int = 1  # the largest rank of the run
    # Of the base's weights, by module: they are computed once in a run.
    known: dict[str, Factors] = field(default_factory=dict)

    def rows(self, rank: int, width: int, *part: int) -> torch.Tensor:
        """[rank, width] in float32, uniform in ±1/√width or normal with standard deviation 1/rank.

        Rows are drawn one after the other, so a lower rank gets the first rows. `part` numbers the matrices of a module.
        """
        generator = self._generator(*part)
        if self.init == "gaussian":
            return torch.from_numpy(generator.standard_normal((rank, width)) / rank).float()
        bound = 1 / math.sqrt(width)
        return torch.from_numpy(generator.uniform(-bound, bound, (rank, width))).float()

    def orthogonal(self, rank: int, columns: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, columns] and B [rows, rank] in float64 with B·A = 0, as PEFT makes them of an even rank.

        All ranks mix the first rows of one draw, each by a rotation of its own size.
        """
        square = self._generator(0).standard_normal((rank, rank))
        rotation = torch.linalg.qr(torch.from_numpy(square))[0]
        a, b = (self._generator(part).standard_normal((rank // 2, width)) for part, width in ((1, columns), (2, rows)))
        return rotation[0::2].T @ torch.from_numpy(a) / 10, torch.from_numpy(b).T @ rotation[1::2] / 10

    def normal(self, rank: int, width: int) -> torch.Tensor:
        """[rank, width] in float64, standard normal, a lower rank with the first rows."""
        return torch.from_numpy(self._generator().standard_normal((rank, width)))

    def _generator(self, *part: int) -> np.random.Generator:
        digest = hashlib.sha256(self.module.encode()).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest[:8], "big"), *part])


@dataclass(frozen=True, slots=True)
class StoredPair:
    """The A and B of one module in an adapter's file, as `adapter_config.json` and the header describe them."""

    module: str  # the module's name as PEFT writes it, without its prefix
    embedding: bool  # whether the keys are lora_embedding_A and lora_embedding_B
    a: tuple[int, ...]
    b: tuple[int, ...]
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """The matrices ΔW [rows, columns] of a pair, each of `rank`."""

    rank: int
    rows: int
    columns: int
    names: tuple[str, ...]  # of the matrices in the base; several where one pair holds them, such as experts


class AdapterKind(ABC):
    """One way in which PEFT adapts a layer. The defaults are those of s·B·A with A and B as matrices."""

    name: ClassVar[str]  # in the records of `inspect` and `resize`
    label: ClassVar[str]  # in messages, with its article: "a convolution"
    unshared_reason: ClassVar[str | None] = None  # why no two adapters share a pass; None: they do
    unselectable_reason: ClassVar[str | None] = None  # why `select`, which trains text models, does not train it
    untruncatable_reason: ClassVar[str | None] = None  # why no adapter of a lower rank can be made of one

    @abstractmethod
    def adapts(self, module: Any) -> bool:
        """Whether PEFT's layer `module` (a `LoraLayer`) carries adapters of this kind."""

    def shapes(self, module: Any) -> list[tuple[str, int, int]]:
        """`(name after the module's, rows, columns)` of each matrix ΔW; the name is empty for a single one."""
        return [("", int(module.out_features), int(module.in_features))]

    def start(self, module: Any, adapter: str, draw: InitialDraw) -> None:
        """Set the adapter's tensors to their first values."""
        a = module.lora_A[adapter].weight
        a.copy_(draw.rows(a.shape[0], a[0].numel()).view_as(a).to(a))
        module.lora_B[adapter].weight.zero_()

    def forward(self, module: Any, routing: CurrentRouting, *args: Any, **kwargs: Any) -> Any:
        """The forward pass that replaces the module's own: each row with the tensors of its adapter.

        By default PEFT's own for the one adapter of a pass; without a routing, the base's.
        """
        current = routing()
        if current is None:
            return module.base_layer(*args, **kwargs)
        if len(current.adapters) > 1:
            raise MultiLoraError(f"{self.label} trains alone, through PEFT's own forward pass")
        with _enable_dropout(module, current.adapters[0], current.dropout_seeds[0]):
            return type(module).forward(module, *args, **kwargs)

    def stores(self, pair: StoredPair) -> bool:
        """Whether the pair is of this kind; by default no file is."""
        return False

    def address(self, pair: StoredPair) -> str:
        """The name by which PEFT's `rank_pattern` and `alpha_pattern` address the pair."""
        return pair.module

    def layout(self, pair: StoredPair, rank: int) -> Layout | None:
        """The matrices of a pair that `stores` accepts, of `rank` by the configuration; None where its shapes do not multiply."""
        if pair.b[1] != pair.a[0] or math.prod(pair.b[2:]) != 1:
            return None
        return Layout(pair.a[0], pair.b[0], math.prod(pair.a[1:]), (self.address(pair),))

    def matrices(self, a: torch.Tensor, b: torch.Tensor, rank: int) -> list[Factors]:
        """`(B [rows, r], A [r, columns])` of each matrix, from a pair as it is stored."""
        return [(b.reshape(b.shape[0], rank), a.reshape(rank, -1))]

    def tensors(
        self, factors: Sequence[Factors], a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(A, B)` to store for the matrices' factors, at their rank, in the layout of the old pair `a` and `b`."""
        ((new_b, new_a),) = factors
        rank = new_a.shape[0]
        return new_a.reshape(rank, *a.shape[1:]), new_b.reshape(b.shape[0], rank, *b.shape[2:])


@contextmanager
def set_training_mode(value: bool, modules: Iterable[Any]) -> Iterator[None]:
    """Within the block, these modules alone are in training mode, or in evaluation mode; after it, in the other."""
    kept = list(modules)
    for module in kept:
        module.training = value
    try:
        yield
    finally:
        for module in kept:
            module.training = not value


@contextmanager
def _enable_dropout(module: Any, adapter: str, seed: int | None) -> Iterator[None]:
    """Within the block, PEFT's layer is in training mode, and its dropout draws from the seed and the layer; None: neither.

    The layers inside keep their mode. Gradient checkpointing computes a layer again, and draws the same.
    """
    if seed is None:
        yield
        return
    trained = [module]
    if adapter in module.lora_dropout and isinstance(module.lora_dropout[adapter], torch.nn.Dropout):
        trained.append(module.lora_dropout[adapter])
    draws = len(trained) > 1
    with torch.random.fork_rng(enabled=draws):
        if draws:
            torch.manual_seed((seed * 0x9E3779B1 + module.rightrank_salt) % 2**63)
        with set_training_mode(True, [part for part in trained if not part.training]):
            yield
