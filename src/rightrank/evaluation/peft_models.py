"""PEFT models in memory: find their modules, switch and remove adapters, gather second moments, and save an adapter as a folder.

Second moments over training examples weight a truncation (`adapters.truncation`). A forward hook on each adapted module gives
h = A·x [n, r], and a hook on its output gives g [n, out], from which δ = s·Bᵀ·g follows. Only r × r sums are stored. A pass costs as much
as a training step of the same micro-batch without parameter gradients and without the optimizer. The peak memory therefore stays below that
of a training step, and the fraction of the training time stays below the fraction of the training tokens.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper

from rightrank.adapters.adapter_folders import CLASSIFIER_FILE, find_base_changing_init
from rightrank.adapters.truncation import Moments
from rightrank.data.files import replace_folder, write_text

ADAPTER = "default"  # PEFT's name for the only adapter of a model
MOMENT_TOKENS = 4096  # see benchmarks/README.md, archive
ZERO_GRADIENT_TOLERANCE = 1e-6  # relative to a batch's largest gradient; a smaller gradient counts as none


@contextmanager
def suppress_peft_warnings() -> Iterator[None]:
    """Suppress PEFT's warnings that a user cannot act on, within the block."""
    with warnings.catch_warnings():
        # PEFT reads an attribute that transformers 5 deprecates.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        # PEFT detects transposed layers, such as GPT-2's, and warns for each.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to (False|True) but")
        # PEFT adds patterns for fused experts, which may have no adapter.
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
        yield


def find_lora_modules(peft_model: Any) -> dict[str, Any]:
    """Return the adapted modules by their names in the base model."""
    base = peft_model.base_model.model
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def use_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Compute with the adapter `name` alone, or with none, within the block. Nothing else changes."""
    layers: list[Any] = [
        module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    previous_states = [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer, previous_adapter, _ in previous_states:
        layer._active_adapter, layer._disable_adapters = previous_adapter if name is None else [name], name is None
    try:
        yield
    finally:
        for layer, previous_adapter, was_disabled in previous_states:
            layer._active_adapter, layer._disable_adapters = previous_adapter, was_disabled


def set_update_to_zero(peft_model: Any, adapter: str) -> None:
    """Set the update of an adapter in memory to zero, as for rank 0. Other trained modules keep their values."""
    with torch.no_grad():
        for module in find_lora_modules(peft_model).values():
            module.lora_variant.pop(adapter, None)  # DoRA would scale the rows of the base
            for factors in (module.lora_B, module.lora_embedding_B):
                if adapter in factors:
                    factor = factors[adapter]
                    for tensor in factor.parameters() if isinstance(factor, torch.nn.Module) else [factor]:
                        tensor.zero_()


def unwrap_base(peft_model: Any) -> Any:
    """Remove PEFT's layers from the base and freeze it.

    PEFT's `unload` leaves the trained copy of each module in `modules_to_save` (for example a classification head) in
    the base. This function restores the base's own module, so that the next arm does not start from a trained one.
    """
    originals = {
        name: module.original_module
        for name, module in peft_model.base_model.model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    base = peft_model.unload()
    for name, module in originals.items():
        base.set_submodule(name, module)
    base.requires_grad_(False)
    if hasattr(base, "peft_config"):
        del base.peft_config
    return base


@dataclass(frozen=True, slots=True)
class GatheredMoments:
    """Moments by module name in the base model, with the number of tokens that they were computed from."""

    moments: Mapping[str, Moments]
    tokens: int
    notices: tuple[str, ...] = ()  # modules that are truncated by the plain SVD instead, and why


def accumulate_moments(
    peft_model: Any, names: Sequence[str], passes: Iterable[tuple[int, int]], adapter: str
) -> GatheredMoments:
    """Run the passes and return the moments of the named modules.

    Args:
        passes: each item runs a forward and a backward pass and yields the numbers of tokens and labels read.
    """
    # By module, in float32 on the device: the sums of outer products of inputs and of gradients, and the number of rows.
    sums: dict[str, tuple[torch.Tensor, ...]] = {}

    def accumulate(name: str, hidden: torch.Tensor, gradients: torch.Tensor) -> None:
        """Add one pass to the sums. Positions without a gradient (padding, or tokens that reach no label) do not count."""
        hidden, gradients = hidden.float(), gradients.float()
        size = gradients.abs().amax(dim=1, keepdim=True)
        # A product keeps NaN and infinity and needs no device synchronisation, unlike an index.
        is_active = size > ZERO_GRADIENT_TOLERANCE * size.max()
        hidden, gradients = hidden * is_active, gradients * is_active
        moment_sums = hidden.T @ hidden, gradients.T @ gradients, is_active.sum()
        sums[name] = moment_sums if name not in sums else tuple(map(torch.add, moment_sums, sums[name]))

    tokens = labels = 0
    with _observe_rank_space(peft_model, names, accumulate, adapter):
        for pass_tokens, pass_labels in passes:
            tokens, labels = tokens + pass_tokens, labels + pass_labels
    are_finite = all(bool(torch.isfinite(tensor).all()) for module_sums in sums.values() for tensor in module_sums)
    if not labels or not are_finite:
        reason = "a gradient is not finite" if labels else "the training examples that were read have no labels"
        return GatheredMoments({}, tokens, (f"truncated by the plain SVD, without second moments: {reason}",))
    moments = {
        name: Moments(
            inputs.cpu().double().numpy() / max(1, int(rows)), gradients.cpu().double().numpy() / max(1, labels)
        )
        for name, (inputs, gradients, rows) in sums.items()
    }
    missing = [name for name in names if name not in sums]
    notice = (
        f"{len(missing)} of {len(names)} modules ({', '.join(missing[:1])}, …) are truncated by singular values: the loss does not depend on "
        "them, or the model computes their layers without calling PEFT's modules (fused kernels)"
    )
    return GatheredMoments(moments, tokens, (notice,) if missing else ())


@contextmanager
def _observe_rank_space(
    peft_model: Any, names: Sequence[str], callback: Callable[[str, torch.Tensor, torch.Tensor], None], adapter: str
) -> Iterator[None]:
    """Call `callback(name, h [n, r], δ [n, r])` for the named modules in every backward pass within the block.

    Parameters get no gradients within the block.
    """
    modules = find_lora_modules(peft_model)
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    handles = [
        modules[name].register_forward_hook(partial(_observe_module, partial(callback, name), adapter))
        for name in names
    ]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def _observe_module(
    callback: Callable[[torch.Tensor, torch.Tensor], None],
    adapter: str,
    module: Any,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return output
    if not output.requires_grad:  # no module below the first adapted one requires a gradient
        output.requires_grad_()
    a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
    hidden = inputs[0].detach().flatten(0, -2).to(a.dtype) @ a.T

    def observe_gradient(gradient: torch.Tensor) -> None:
        callback(hidden, module.scaling[adapter] * gradient.detach().flatten(0, -2).to(b.dtype) @ b)

    register: Any = output.register_hook  # untyped in torch
    register(observe_gradient)
    return output


def save_adapter(peft_model: Any, folder: Path, base_name: str, adapter: str = "default") -> None:
    """Save the configuration and weights of an adapter, and the labels of a classifier.

    Args:
        base_name: An absolute path or a hub name, which the adapter's configuration refers to.
    """
    config = peft_model.peft_config[adapter]
    # PEFT modifies the configuration that it saves.
    saved_config = peft_model.peft_config[adapter] = copy.deepcopy(config)
    saved_config.base_model_name_or_path = base_name
    if find_base_changing_init(vars(saved_config)) is None:
        # Loading replaces the first values, and other names of PEFT do not take every rank.
        saved_config.init_lora_weights, saved_config.eva_config = True, None
    with replace_folder(folder) as temporary, warnings.catch_warnings():
        # PEFT takes the biases of lora_bias for factors of a wrong shape.
        warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape: \S+lora_B\.bias")
        try:
            peft_model.save_pretrained(
                str(temporary),
                safe_serialization=True,
                selected_adapters=[adapter],
                save_embedding_layers=False,
            )
        finally:
            peft_model.peft_config[adapter] = config
        if adapter != "default":  # PEFT saves a named adapter in a subfolder
            for path in list((temporary / adapter).iterdir()):
                path.replace(temporary / path.name)
            (temporary / adapter).rmdir()
        if config.task_type == "SEQ_CLS":
            _write_classifier_labels(temporary, peft_model.config)
        # PEFT's empty template; the final adapter gets a model card of its own.
        (temporary / "README.md").unlink(missing_ok=True)


def _write_classifier_labels(folder: Path, config: Any) -> None:
    """Write the number, names and order of a classifier's labels.

    PEFT's configuration has no field for them, and a base model that is loaded without them gets a head of two labels. The file holds the
    arguments of `from_pretrained` that create the trained head: `num_labels`, `id2label`, `label2id` and `pad_token_id`.
    """
    names = {int(number): str(label) for number, label in config.id2label.items()}
    arguments = {
        "num_labels": len(names),
        "id2label": {str(number): names[number] for number in sorted(names)},
        "label2id": {names[number]: number for number in sorted(names)},
    }
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    arguments |= {} if pad is None else {"pad_token_id": pad}  # needed to find the last token of a shorter row
    write_text(folder / CLASSIFIER_FILE, json.dumps(arguments, indent=2, ensure_ascii=False) + "\n")
