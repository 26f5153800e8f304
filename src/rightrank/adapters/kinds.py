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
are neighbours. The other kinds have this layout with E = 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def find_expert_parameter(module: str, config: Mapping[str, Any]) -> str | None:
    """Return the name of the parameter in the base that holds the experts of a pair, or None if the pair adapts a layer.

    Args:
        module: The module's name as PEFT writes it, without its prefix; its depth of wrappers tells the parameter.
        config: The adapter's configuration.
    """
    holder = module.replace(WRAPPER_SUFFIX, "")
    targets = [str(target).rpartition(".") for target in config.get("target_parameters") or ()]
    parameters = [parameter for path, _, parameter in targets if path and f".{holder}".endswith(f".{path}")]
    if not parameters:
        return None
    parameters.sort(key=lambda name: any(last_name in name for last_name in LAST_PARAMETERS))
    return f"{holder}.{parameters[max(0, len(parameters) - 1 - module.count(WRAPPER_SUFFIX))]}"


def name_experts(parameter: str, experts: int) -> list[str]:
    """Return the names of the matrices of a parameter that holds this number of experts."""
    return [parameter] if experts == 1 else [f"{parameter}.{expert}" for expert in range(experts)]


def unpack_factors(a: Floats, b: Floats, rank: int) -> list[Factors]:
    """Return `(B [rows, r], A [r, columns])` of each matrix of a stored pair."""
    experts = len(a) // rank
    by_expert, rows = b.reshape(len(b), rank, experts), a.reshape(len(a), -1)
    return [(by_expert[:, :, expert], rows[expert * rank : (expert + 1) * rank]) for expert in range(experts)]


def pack_factors(factors: Sequence[Factors], a: tuple[int, ...], b: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Return `(A, B)` to store for the factors of the matrices, at their rank, in the layout of a pair of shapes `a` and `b`."""
    new_a = np.concatenate([matrix_a for _, matrix_a in factors])
    new_b = np.stack([matrix_b for matrix_b, _ in factors], axis=2)
    return new_a.reshape(-1, *a[1:]), new_b.reshape(b[0], -1, *b[2:])
