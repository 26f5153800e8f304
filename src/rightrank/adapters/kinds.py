"""The kinds of stored adapters: how the factors A and B of linear layers, embeddings, convolutions and fused experts are laid out in a file.

Embeddings: ΔW = s·B·A [width, vocabulary], of which a token takes one column.

Convolutions: ΔW = s·B·A as the matrix [out, in × kernel] that PEFT's kernels imply. PEFT adapts a convolution by two: A has
the same kernel, stride and padding and r output channels, and B has a kernel of size one. The composition has the kernel
s·Σᵣ B[o, r]·A[r, i, …], so its norm and its best approximation of a lower rank are those of the matrix. Grouped
convolutions are not supported: PEFT's B then sees only some of the r channels.

DoRA has the layout of the layer that it adapts, and a magnitude for each row.

Fused experts: a parameter [experts, …] of a mixture that PEFT adapts through `target_parameters`, with one ΔW for each expert.
PEFT wraps the module that holds the parameter, and the wrapper of a second parameter of that module wraps the first. In a
file, `experts.base_layer` is the parameter that the module registered first, and `experts` the last one. For E experts A is stored as
[E·r, in], the r rows of one expert after those of another, and B as [out, r·E], in which the E columns of one direction
are neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rightrank.schema.trials import Floats

MAGNITUDE_KEYS = (
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
)  # suffixes of the module's name in PEFT's files
WRAPPER_SUFFIX = ".base_layer"  # PEFT's suffix for each nested wrapper
LAST_PARAMETERS = ("down", "w2", "output")  # names of parameters that modules register last

Factors = tuple[Floats, Floats]  # B [rows, r] and A [r, columns]


@dataclass(frozen=True, slots=True)
class StoredPair:
    """The factors A and B of one module in an adapter's file, as `adapter_config.json` and the header describe them."""

    module: str  # the module's name as PEFT writes it, without its prefix
    is_embedding: bool  # whether the keys are lora_embedding_A and lora_embedding_B
    a: tuple[int, ...]
    b: tuple[int, ...]
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Layout:
    """The matrices ΔW [rows, columns] of a pair, each of rank `rank`."""

    rank: int
    rows: int
    columns: int
    names: tuple[str, ...]  # of the matrices in the base; several where one pair holds them, such as experts


class StoredKind:
    """The layout of a pair of matrices A and B, which is that of linear layers and of embeddings.

    `unpack_factors` and `pack_factors` are inverse to each other, and the sum of squared differences of the matrices s·B·A equals that of
    the updates of the weights.
    """

    def __init__(self, name: str) -> None:
        self.name = name  # in the records of `inspect` and `resize`

    def get_address(self, pair: StoredPair) -> str:
        """Return the name by which PEFT's `rank_pattern` and `alpha_pattern` address the pair."""
        return pair.module

    def build_layout(self, pair: StoredPair, rank: int) -> Layout | None:
        """Return the matrices of a pair, or None if its shapes do not multiply.

        Args:
            rank: The rank by the configuration.
        """
        if pair.b[1] != pair.a[0] or math.prod(pair.b[2:]) != 1:
            return None
        return Layout(pair.a[0], pair.b[0], math.prod(pair.a[1:]), (self.get_address(pair),))

    def unpack_factors(self, a: Floats, b: Floats, rank: int) -> list[Factors]:
        """Return `(B [rows, r], A [r, columns])` of each matrix of a stored pair."""
        return [(b.reshape(b.shape[0], rank), a.reshape(rank, -1))]

    def pack_factors(self, factors: Sequence[Factors], a: tuple[int, ...], b: tuple[int, ...]) -> tuple[Floats, Floats]:
        """Return `(A, B)` to store for the factors of the matrices, at their rank, in the layout of a pair of shapes `a` and `b`."""
        ((new_b, new_a),) = factors
        rank = new_a.shape[0]
        return new_a.reshape(rank, *a[1:]), new_b.reshape(b[0], rank, *b[2:])


class _Convolution(StoredKind):
    def build_layout(self, pair: StoredPair, rank: int) -> Layout | None:
        return super().build_layout(pair, rank) if len(pair.b) == len(pair.a) else None


class _Experts(StoredKind):
    def get_address(self, pair: StoredPair) -> str:
        """Return the name of the parameter in the base model, which depends on the depth of the wrapper."""
        parameters = sorted(
            _find_target_parameters(pair), key=lambda name: any(last_name in name for last_name in LAST_PARAMETERS)
        )
        depth = pair.module.count(WRAPPER_SUFFIX)
        parameter = parameters[max(0, len(parameters) - 1 - depth)]
        return f"{pair.module.replace(WRAPPER_SUFFIX, '')}.{parameter}"

    def build_layout(self, pair: StoredPair, rank: int) -> Layout | None:
        if rank < 1 or pair.b[1] != pair.a[0] or pair.a[0] % rank:
            return None
        names = name_experts(self.get_address(pair), pair.a[0] // rank)
        return Layout(rank, pair.b[0], pair.a[1], tuple(names))

    def unpack_factors(self, a: Floats, b: Floats, rank: int) -> list[Factors]:
        experts = a.shape[0] // rank
        by_expert = b.reshape(b.shape[0], rank, experts)
        return [(by_expert[:, :, expert], a[expert * rank : (expert + 1) * rank]) for expert in range(experts)]

    def pack_factors(self, factors: Sequence[Factors], a: tuple[int, ...], b: tuple[int, ...]) -> tuple[Floats, Floats]:
        new_b = np.stack([one_b for one_b, _ in factors], axis=2)
        return np.concatenate([one_a for _, one_a in factors]), new_b.reshape(b[0], -1)


LINEAR, EMBEDDING, CONVOLUTION, EXPERT = (
    StoredKind("linear"),
    StoredKind("embedding"),
    _Convolution("convolution"),
    _Experts("expert"),
)


def find_stored_kind(pair: StoredPair) -> StoredKind:
    """Return the kind of a pair in an adapter's file."""
    if pair.is_embedding:
        return EMBEDDING
    if len(pair.a) > 2:
        return CONVOLUTION
    return EXPERT if _find_target_parameters(pair) else LINEAR


def name_experts(parameter: str, experts: int) -> list[str]:
    """Return the names of the matrices of a parameter that holds this number of experts."""
    return [parameter] if experts == 1 else [f"{parameter}.{expert}" for expert in range(experts)]


def _find_target_parameters(pair: StoredPair) -> list[str]:
    """Return the names of the `target_parameters` within the pair's module."""
    module = f".{pair.module.replace(WRAPPER_SUFFIX, '')}"
    targets = [str(target).rpartition(".") for target in pair.config.get("target_parameters") or ()]
    return [parameter for path, _, parameter in targets if path and module.endswith(f".{path}")]
