"""The model without weights: built on the meta device from its configuration, adapted by PEFT itself.

Nothing is downloaded or loaded beyond `config.json` (or a GGUF header), and no code of a model's own is run unless
that was allowed.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rightrank.engine.targets import ALL_LINEAR, all_linear_names, common_fields, require_layers, require_names
from rightrank.errors import ModelError, first_line
from rightrank.io.models import DTYPES, LOADING_ERRORS, find_model, quiet_third_parties
from rightrank.planning.quantised import quantise
from rightrank.settings import PlanSettings

MOST_LAYERS = 1000
LARGEST_SIZE = 2**40
SAFETENSORS_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.int8: "I8",
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """An adapted weight of out_features × in_features."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A PEFT model on the meta device."""

    model: Any  # PeftModel
    matrices: tuple[Matrix, ...]
    arms: tuple[str, ...]  # names of the adapters

    @property
    def base(self) -> Any:
        return self.model.get_base_model()

    def trainable(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def stored(self) -> list[torch.Tensor]:
        """All parameters and buffers, tied ones once."""
        return [*self.model.parameters(), *self.model.buffers()]

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """What PEFT writes into `adapter_model.safetensors`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT says that an embedding is saved with the adapter: it is counted
            state: dict[str, torch.Tensor] = get_peft_model_state_dict(self.model)
        return state


def read_config(reference: str, trust_remote_code: bool, classification: bool = False) -> Any:
    """The configuration of a model folder, a GGUF file or a hub name.

    Raises:
        ModelError: no configuration there, an unknown architecture, or one that needs code of its own.
    """
    source = find_model(reference)
    quiet_third_parties()
    try:
        config = AutoConfig.from_pretrained(source.name, **source.loading_arguments(trust_remote_code))
    except LOADING_ERRORS as error:
        raise ModelError(f"{reference}: transformers knows no such model ({first_line(error)})") from None
    if not is_known(config, classification) and not trust_remote_code:
        kind = "sequence classification" if classification else "causal language"
        other = "" if classification else " (a classification model is planned with num_labels)"
        raise ModelError(f"{reference}: {config.model_type!r} is no {kind} model that transformers knows{other}")
    text = config.get_text_config()
    _require_sane_sizes(reference, text)
    text.use_cache = False  # as Trainer trains
    return config


def _require_sane_sizes(reference: str, text: Any) -> None:
    """Refuse a configuration whose building alone would not end.

    Raises:
        ModelError: more layers than any model has, or a size beyond them all.
    """
    heads, groups = getattr(text, "num_attention_heads", 1), getattr(text, "num_key_value_heads", None) or 1
    if isinstance(heads, int) and isinstance(groups, int) and (heads < 1 or groups < 1 or heads % groups):
        raise ModelError(
            f"{reference}: {heads} heads do not share {groups} key-value heads evenly; restore config.json"
        )
    layers = getattr(text, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ModelError(f"{reference}: {layers} layers are more than any model has (at most {MOST_LAYERS})")
    for name, value in text.to_dict().items():
        if isinstance(value, int) and abs(value) > LARGEST_SIZE:
            raise ModelError(f"{reference}: {name} is {value}, more than any model has (at most {LARGEST_SIZE})")


def is_known(config: Any, classification: bool) -> bool:
    """Whether transformers itself has a causal language (or a classification) model for this configuration."""
    auto: Any = AutoModelForSequenceClassification if classification else AutoModelForCausalLM
    return type(config) in auto._model_mapping


def build_base(config: Any, settings: PlanSettings) -> Any:
    """The base model on the meta device, frozen, quantised as asked.

    Raises:
        ModelError: transformers can't build it.
    """
    # None is transformers' own choice: torch's fused attention, for the models that can take it.
    attention = "eager" if settings.attn_implementation == "eager" else None
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config  # weights are quantised below, in shapes alone
    text = plain.get_text_config()
    auto: Any = AutoModelForCausalLM
    if settings.num_labels is not None:
        auto, plain.num_labels = AutoModelForSequenceClassification, settings.num_labels
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = text.vocab_size - 1  # as on loading: batches of several rows need one
    try:
        with torch.device("meta"):
            model = auto.from_config(
                plain,
                dtype=DTYPES[settings.dtype],
                attn_implementation=attention,
                trust_remote_code=settings.trust_remote_code,
            )
    except LOADING_ERRORS as error:
        raise ModelError(f"{config.model_type}: transformers can't build the model ({first_line(error)})") from None
    model.requires_grad_(False)
    quantise(model, settings)
    return model


def adapt(model: Any, settings: PlanSettings, rank: int, arms: int = 1) -> Skeleton:
    """`model` with adapters of `rank` put on by PEFT, one for each arm. The model itself is changed.

    Raises:
        ModelError: targets that match nothing or only in part, or that PEFT can't adapt.
    """
    require_names(model, settings.target_modules, settings.modules_to_save)
    require_layers(model, settings.layers_to_transform)
    _require_patterns(model, settings.rank_pattern)
    names = ("default", *(f"arm_{number}" for number in range(1, arms)))
    how: dict[str, Any] = {"autocast_adapter_dtype": settings.autocast_adapter_dtype, "low_cpu_mem_usage": True}
    try:
        with _peft_quiet(), torch.device("meta"):
            config = lora_config(model, settings, rank)
            adapted = get_peft_model(model, config, **how)
            for name in names[1:]:
                adapted.add_adapter(name, copy.deepcopy(config), **how)
    except (ValueError, TypeError) as error:
        raise ModelError(f"PEFT can't adapt the model ({first_line(error)})") from None
    for name, parameter in adapted.named_parameters():
        if not set(names[1:]).isdisjoint(name.split(".")):
            parameter.requires_grad_(True)  # PEFT trains the active one alone
    return Skeleton(adapted, tuple(_matrices(adapted)), names)


def require_rank(skeleton: Skeleton, settings: PlanSettings) -> None:
    """Refuse a rank above what a matrix can have, and name the matrix.

    Raises:
        ModelError: such a rank.
    """
    largest = max(settings.ranks)
    for matrix in skeleton.matrices:
        limit = min(matrix.out_features, matrix.in_features)
        if largest > limit and not any(matrix.name.endswith(name) for name in settings.rank_pattern):
            raise ModelError(
                f"rank {largest} is above the {limit} that {matrix.name} ({matrix.out_features} × "
                f"{matrix.in_features}) can have; give ranks up to {limit}, or exclude_modules"
            )


def lora_config(model: Any, settings: PlanSettings, rank: int) -> LoraConfig:
    """PEFT's configuration of an adapter of `rank` under these settings."""
    targets = settings.target_modules
    if targets == (ALL_LINEAR,) and settings.layers_to_transform is not None:
        targets = all_linear_names(model, settings.num_labels is not None)  # PEFT wants names where it is told layers
    return LoraConfig(
        r=rank,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else (list(targets) or None),
        target_parameters=list(settings.target_parameters) or None,
        rank_pattern=dict(settings.rank_pattern),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        **common_fields(settings, settings.num_labels is not None),
    )


def _matrices(model: Any) -> Iterator[Matrix]:
    prefix = "base_model.model."
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            rows: Any = module.out_features
            columns: Any = module.in_features
            yield Matrix(name.removeprefix(prefix), int(rows), int(columns))


def _require_patterns(model: Any, rank_pattern: Mapping[str, int]) -> None:
    """PEFT ignores a misspelt key of `rank_pattern`; here it is an error."""
    names = [name for name, _ in model.named_modules()]
    for key, rank in rank_pattern.items():
        if rank < 1:
            raise ModelError(f"rank_pattern: got {key}: {rank}; ranks are integers from 1")
        if not _matches_any(key, names):
            raise ModelError(f"rank_pattern: no module matches {key!r}; keys are ends of module names, or patterns")


def _matches_any(key: str, names: list[str]) -> bool:
    return any(re.match(rf"(.*\.)?({key})$", name) for name in names)


@contextmanager
def _peft_quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT and transformers about each other: nothing a user could act on
        yield
