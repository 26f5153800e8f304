"""Routing: which rows of a batch belong to which adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from rightrank.schema.errors import MultiLoraError


@dataclass(frozen=True, slots=True)
class Part:
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
    layouts: dict[int, list[Part]] = field(default_factory=dict)  # by the number of rows of the flattened input

    @classmethod
    def packed(cls, adapters: Sequence[str], seeds: Sequence[int | None], tokens: Sequence[int]) -> Routing:
        """Packed sequences: arms of `tokens[i]` tokens, one after the other in one row."""
        parts = [
            Part(name, count, seed, count, None) for name, seed, count in zip(adapters, seeds, tokens, strict=True)
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
            Part(name, count, seed, count, None) for name, seed, count in zip(adapters, seeds, rows, strict=True)
        ]
        by_token = [
            Part(name, count * longest, seed, count * length, _padded_index(count, length, longest))
            for name, seed, count, length in zip(adapters, seeds, rows, lengths, strict=True)
        ]
        routing.layouts = {sum(rows): by_example, sum(rows) * longest: by_token}
        return routing

    def parts(self, rows: int) -> list[Part]:
        """The arms' parts of a flattened input of `rows` rows.

        Raises:
            MultiLoraError: there is more than one arm, and the rows are neither the batch's examples nor its tokens.
        """
        found = self.layouts.get(rows)
        if found is not None:
            return found
        if len(self.adapters) == 1:
            return [Part(self.adapters[0], rows, self.dropout_seeds[0], rows, None)]
        raise MultiLoraError(f"a layer sees {rows} rows that can't be assigned to arms")

    @contextmanager
    def only_rows(self, keep: torch.Tensor) -> Iterator[None]:
        """Within the block, layers may also see only the rows of the flattened batch that `keep` [b·n] marks."""
        by_token = self.layouts[keep.numel()]
        parts: list[Part] = []
        begin = 0
        for part in by_token:
            chosen = keep[begin : begin + part.rows].nonzero()[:, 0]
            begin += part.rows
            index = chosen if part.alone_index is None else part.alone_index.to(chosen.device)[chosen]
            parts.append(Part(part.adapter, len(chosen), part.dropout_seed, part.alone_rows, index))
        total = sum(part.rows for part in parts)
        before = self.layouts
        self.layouts = before | {total: parts}
        try:
            yield
        finally:
            self.layouts = before


def _padded_index(rows: int, length: int, longest: int) -> torch.Tensor | None:
    """[rows × longest]: the row of each position in the unpadded layout [rows × length]; padding takes any row."""
    if length == longest:
        return None
    columns = torch.arange(longest).clamp(max=length - 1)
    return (torch.arange(rows)[:, None] * length + columns).reshape(-1)
