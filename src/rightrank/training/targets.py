"""The target modules of adapters, matched by PEFT itself and checked before any training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import SEQ_CLS_HEAD_NAMES

from rightrank.adapters.adapter_folders import WRAPPER_SUFFIX
from rightrank.adapters.rank_math import convert_scaling
from rightrank.bases.base_models import find_device
from rightrank.evaluation.peft_models import suppress_peft_warnings
from rightrank.schema.errors import ModelError, get_first_line, suggest_name
from rightrank.schema.settings import PeftFields, SelectSettings
from rightrank.schema.trials import Arm
from rightrank.training.multi_lora import AdapterKind, FusedExperts, find_kind

ALL_LINEAR = "all-linear"

# The kernels of these models read the weights of some modules directly, so PEFT rejects adapters there.
MAMBA_MODEL_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_KERNEL_MODULES = ("out_proj", "conv1d")


@dataclass(frozen=True, slots=True)
class TargetModule:
    """A matrix W [out_features, in_features] that gets an adapter."""

    name: str
    in_features: int
    out_features: int
    kind: AdapterKind

    @property
    def max_rank(self) -> int:
        return min(self.in_features, self.out_features)


@dataclass(frozen=True, slots=True)
class Targets:
    names: tuple[str, ...]  # `all-linear` is resolved to full names or last components of names
    modules: tuple[TargetModule, ...]
    parameters: tuple[str, ...] = ()  # parameters outside of modules, such as those of fused experts
    left_out: tuple[str, ...] = ()  # parameters that PEFT's `all-linear` would adapt too

    @property
    def unshared_reason(self) -> str | None:
        """Return the reason why adapters of this kind cannot share a pass; None if they can."""
        label = next((module.kind.label for module in self.modules if not module.kind.can_share_pass), None)
        return None if label is None else f"{label} runs through PEFT's own forward pass, one adapter at a time"

    @property
    def untruncatable_reason(self) -> str | None:
        """Return the reason why adapters of this kind cannot be truncated; None if they can."""
        label = next((module.kind.label for module in self.modules if not module.kind.can_truncate), None)
        return None if label is None else f"{label}: the meaning of its tensors is unknown"


def find_targets(model: Any, settings: SelectSettings, is_classification: bool) -> Targets:
    """Find the modules that PEFT adapts under these settings.

    Raises:
        ModelError: a name matches no module, a layer does not exist, PEFT cannot adapt a module, or a rank in
            `settings.ranks` is above the largest rank of some matrix.
    """
    require_targets(model, settings, is_classification)
    if settings.use_dora and settings.load_in_8bit and find_device(settings.device).type == "cpu":
        raise ModelError(
            "use_dora with load_in_8bit: PEFT loses the scales of weights in 8 bits on a CPU; give load_in_4bit, or device cuda"
        )
    parameters = find_target_parameters(model, settings)
    probe = Arm(rank=1, learning_rate=1.0, lora_alpha=1.0, seed=0, steps=1)
    skeleton = _make_skeleton(model)
    try:
        names, added_parameters = resolve_target_names(model, settings, is_classification)
        with suppress_peft_warnings():
            get_peft_model(skeleton, make_lora_config(settings, probe, is_classification, names, parameters))
    except (ValueError, TypeError) as error:
        reason = get_first_line(error)
        if reason.startswith(("Target modules", "No modules", "No `target_modules`")):
            raise ModelError(f"PEFT finds no module to adapt ({reason}); {_describe_linear_modules(model)}") from None
        refusal = f"PEFT can't make this adapter: {reason.rstrip('.')}; change the settings of the adapter"
        raise ModelError(refusal) from None
    modules = tuple(find_adapted_matrices(skeleton))
    for module in modules:
        _require_trainable(module, skeleton)
        require_ranks(module, settings.ranks)
    skipped_parameters = tuple(
        name
        for name in added_parameters
        if not any(parameter.endswith(name) for parameter in settings.target_parameters)
    )
    return Targets(tuple(sorted(names)), modules, tuple(parameters), skipped_parameters)


def require_targets(model: Any, settings: PeftFields, is_classification: bool) -> None:
    """Check that the task fits the data and that every name of modules and parameters matches one in the layers of the settings.

    PEFT accepts a list if one of its names matches.

    Raises:
        ModelError: a name matches nothing (the message lists the names that exist); a layer does not exist.
    """
    names = {name for name, _ in model.named_modules() if name}
    targets = [name for name in settings.target_modules if name != ALL_LINEAR]
    if ALL_LINEAR in settings.target_modules and len(settings.target_modules) > 1:
        raise ModelError(
            "target_modules holds 'all-linear' beside other names; give 'all-linear' alone, or names alone"
        )
    for target in (*targets, *settings.modules_to_save, *settings.exclude_modules):
        if not any(_has_name(target, name) for name in names):
            raise ModelError(f"no module is named {target!r}; {_describe_linear_modules(model)}")
    count = max((layer for name in names if (layer := _parse_layer(name)) is not None), default=-1) + 1
    for layer in settings.layers_to_transform or ():
        if not 0 <= layer < count:
            raise ModelError(f"layers_to_transform: got {layer}; the model's layers are 0 to {count - 1}")
    parameters = dict(model.named_parameters())
    for target in settings.target_parameters:
        if not any(_has_name(target, name) for name in parameters):
            stacked = {".".join(name.rsplit(".", 3)[-3:]) for name, value in parameters.items() if value.dim() == 3}
            available = f"; the model's expert parameters are: {', '.join(sorted(stacked)) or 'none'}"
            suggestion = suggest_name(target, stacked)
            raise ModelError(f"target_parameters: no parameter is named {target!r}{suggestion or available}")


def find_target_parameters(model: Any, settings: PeftFields) -> list[str]:
    """Return the full names of `target_parameters` in the layers of the settings; PEFT checks the layers of modules only."""
    targets, layers = settings.target_parameters, settings.layers_to_transform
    if layers is None or not targets:
        return list(targets)
    names = (name for name, _ in model.named_parameters() if any(_has_name(target, name) for target in targets))
    return [name for name in names if _parse_layer(name) in layers]


def _parse_layer(name: str) -> int | None:
    """Return the first number among the components of a module's name."""
    match = re.match(r".*?\.(\d+)\.", name)
    return None if match is None else int(match[1])


def resolve_target_names(
    model: Any, settings: PeftFields, is_classification: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of `target_modules`, and the parameters that PEFT's `all-linear` adds to them.

    PEFT resolves `all-linear` within the layers of the settings: every linear module except the output head and the Mamba modules
    whose weights its kernels read directly, and the parameters of fused experts.
    """
    if settings.target_modules != (ALL_LINEAR,):
        return settings.target_modules, ()
    task = _get_task_type(is_classification)
    excluded_names = find_unadaptable_names(model, is_classification)
    config = LoraConfig(task_type=task, target_modules=ALL_LINEAR, exclude_modules=excluded_names or None)
    skeleton = _make_skeleton(model)
    module_names = {name for name, _ in skeleton.named_modules()}
    with suppress_peft_warnings():
        inject_adapter_in_model(config, skeleton)
    linear = sorted(name for name in config.target_modules or () if name.rpartition(".")[2] not in excluded_names)
    # PEFT checks the layer of a module whose name ends with a target, but not if the name equals the target.
    names = tuple(name for name in linear if name not in module_names or _is_in_layers(name, settings))
    return names, tuple(sorted(config.target_parameters or ()))


def find_unadaptable_names(model: Any, is_classification: bool) -> list[str]:
    """Return names of linear modules that PEFT's `all-linear` includes but cannot adapt.

    These are Mamba's, and for a classifier every name that ends with the name of its head, which PEFT trains fully (for example
    DistilBERT's pre_classifier).
    """
    names = list(MAMBA_KERNEL_MODULES) if getattr(model.config, "model_type", None) in MAMBA_MODEL_TYPES else []
    if is_classification:
        linear = {
            name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
        }
        names += sorted(name for name in linear - {*SEQ_CLS_HEAD_NAMES} if name.endswith(tuple(SEQ_CLS_HEAD_NAMES)))
    return names


def _is_in_layers(name: str, settings: PeftFields) -> bool:
    """Return whether PEFT's layer test accepts a module of this name. Without `layers_to_transform` it accepts any."""
    layers = settings.layers_to_transform
    if layers is None:
        return True
    _, dot, last = name.rpartition(".")
    pattern = settings.peft_options.get("layers_pattern")
    config = LoraConfig(target_modules=[last], layers_to_transform=list(layers), layers_pattern=pattern)
    return bool(dot) and bool(check_target_module_exists(config, name))


def _make_skeleton(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)(model.config)


def find_adapted_matrices(model: Any) -> Iterator[TargetModule]:
    """Yield every matrix that PEFT adapted in `model`, with its name in the base."""
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        kind, name = find_kind(module), path.replace(WRAPPER_SUFFIX, "")
        for matrix_name, rows, columns in kind.get_shapes(module):
            yield TargetModule(f"{name}.{matrix_name}" if matrix_name else name, columns, rows, kind)


def _require_trainable(module: TargetModule, skeleton: Any) -> None:
    """Raise for a convolution, and for a layer that returns more than its product, such as Llama 4's router."""
    if isinstance(module.kind, FusedExperts):
        return
    layer = skeleton.get_submodule(module.name).get_base_layer()
    if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        raise ModelError(
            f"{module.name} is a {type(layer).__name__}, and adapters of convolutions in a text model are not trained; leave it out with "
            "exclude_modules"
        )
    if isinstance(layer, torch.nn.Linear) and type(layer).forward is not torch.nn.Linear.forward:
        output = layer(torch.empty(1, layer.in_features, device="meta", dtype=layer.weight.dtype))
        if not isinstance(output, torch.Tensor):
            raise ModelError(
                f"{module.name} is a {type(layer).__name__}, which returns more than its product: PEFT can't train an "
                "adapter on it; leave it out with exclude_modules"
            )


def require_ranks(target: TargetModule, ranks: Sequence[int]) -> None:
    """Raise if a rank is above the smaller side of the matrix.

    Raises:
        ModelError: a rank is too large; the message names the matrix.
    """
    too_large = [rank for rank in ranks if rank > target.max_rank]
    if too_large:
        raise ModelError(
            f"rank {too_large[0]} is above the {target.max_rank} that {target.name} "
            f"({target.out_features} × {target.in_features}) can have; give ranks up to {target.max_rank}, or leave it out: "
            f"--set exclude_modules={target.name.rpartition('.')[2]}"
        )


def _describe_linear_modules(model: Any) -> str:
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    }
    return f"the model's linear modules are: {', '.join(sorted(linear)) or 'none'}"


def _has_name(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def make_lora_config(
    settings: SelectSettings,
    arm: Arm,
    is_classification: bool,
    names: Sequence[str],
    parameters: Sequence[str] = (),
) -> LoraConfig:
    alpha = convert_scaling(settings.scaling, arm.lora_alpha, arm.rank)
    return LoraConfig(
        r=arm.rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,  # type: ignore[arg-type]
        target_modules=list(names),
        target_parameters=list(parameters) or None,
        init_lora_weights="gaussian" if settings.init_lora_weights == "gaussian" else True,
        **build_common_fields(settings, is_classification),
    )


def build_common_fields(settings: PeftFields, is_classification: bool) -> dict[str, Any]:
    """Return the fields of PEFT's configuration that training and planning share."""
    layers = settings.layers_to_transform
    return {
        "task_type": _get_task_type(is_classification),
        "layers_to_transform": None if layers is None else list(layers),
        **settings.build_lora_config(),
    }


def _get_task_type(is_classification: bool) -> TaskType:
    return TaskType.SEQ_CLS if is_classification else TaskType.CAUSAL_LM
