"""One arm's adapter on the base: added by PEFT, initialised from the seed's draw, and removed again.

Rank r takes the first r rows of the draw of each module's A, so arms of one seed differ only in their further rows. The
distributions are PEFT's: A is uniform in ±1/√in_features (`default`) or normal with standard deviation 1/r (`gaussian`),
and B is zero. The kind of a module says which tensors these are (`rightrank.models.kinds`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.incremental_pca import IncrementalPCA

from rightrank.models.kinds import kind_of
from rightrank.models.kinds.base import Draw
from rightrank.schema.errors import ModelError
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import Arm
from rightrank.schema.variants import FROM_WEIGHTS
from rightrank.train.targets import without_peft_noise

ADAPTER = "default"  # PEFT's name for the only adapter of a model
EVA_BATCHES = 8  # training batches whose inputs are analysed
MIN_ROWS_PER_DIRECTION = 2  # before a step of the incremental analysis


@contextmanager
def attached(
    model: Any, settings: SelectSettings, arm: Arm, config: LoraConfig, rows: Mapping[str, torch.Tensor] | None = None
) -> Iterator[Any]:
    """The PeftModel of `arm` around `model`, freshly initialised. When the block ends the base is as it was before."""
    biases = trained_biases(model, settings)
    with seeded(arm.seed):
        peft_model = wrapped(model, config)
    try:
        initialise(peft_model, arm, settings, rows=rows)
        adapters_in_training(peft_model)
        yield peft_model
    finally:
        unwrapped(peft_model, biases)


def trained_biases(model: Any, settings: SelectSettings) -> dict[str, torch.Tensor]:
    """Copies of the base's biases, which PEFT trains in place if the `bias` setting says so; else empty."""
    if settings.bias == "none":
        return {}
    return {name: value.detach().clone() for name, value in model.named_parameters() if name.endswith("bias")}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block, torch draws from `seed`: the start of what PEFT alone initialises."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def wrapped(model: Any, config: LoraConfig, adapter: str = ADAPTER) -> Any:
    """PEFT's model around the base. New modules are in evaluation mode, the base's modules keep their mode."""
    in_training = [module for module in model.modules() if module.training]  # checkpointed blocks
    with without_peft_noise():
        peft_model: Any = get_peft_model(model, config, adapter_name=adapter)
    peft_model.train(False)
    for module in in_training:
        module.training = True
    return peft_model


def unwrapped(peft_model: Any, biases: Mapping[str, torch.Tensor] | None = None) -> Any:
    """The base without PEFT's layers, frozen, with the `biases` that `trained_biases` saved.

    PEFT's `unload` leaves the trained copy of each module in `modules_to_save` (a classification head, for example) in
    the base. This function puts the base's own module back, so that the next arm does not start from a trained one.
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
    with torch.no_grad():
        for name, value in (biases or {}).items():
            base.get_parameter(name).copy_(value)
    return base


def adapters_in_training(peft_model: Any) -> None:
    """Put PEFT's layers and their dropout in training mode; the layers of the base keep theirs."""
    for module in lora_modules(peft_model).values():
        module.training = True  # which DoRA asks for before it drops anything out
        module.lora_dropout.train()


def lora_modules(peft_model: Any) -> dict[str, Any]:
    """The adapted modules by their name in the base model."""
    base = peft_model.base_model.model
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def trainable_parameters(peft_model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def initialise(
    peft_model: Any,
    arm: Arm,
    settings: SelectSettings,
    adapter: str = ADAPTER,
    rows: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Set the arm's adapter to its first values, by the kind of each module; `rows` gives the A of modules that do not draw it."""
    init = arm.init_lora_weights or settings.init_lora_weights
    for name, module in lora_modules(peft_model).items():
        if adapter not in module.lora_A and adapter not in module.lora_embedding_A:
            continue
        if adapter in module.lora_A and init in FROM_WEIGHTS:
            _start_from_weights(module, adapter, init, arm.rank)
            continue
        kind_of(module).start(module, adapter, Draw(arm.seed, name, init))
        if rows is not None and name in rows:
            a = module.lora_A[adapter].weight
            a.copy_(rows[name].to(a))


def _start_from_weights(module: Any, adapter: str, init: str, rank: int) -> None:
    """Set an adapted module's A [2r, in] and B [out, 2r] from its base weight; the second half gets no gradient.

    Raises:
        ModelError: the weight is quantised.
    """
    weight = module.get_base_layer().weight
    if not weight.is_floating_point() or weight.dim() != 2:
        raise ModelError(f"init={init} needs the base's unquantised weights; load the base in 16 or 32 bits")
    matrix = weight.detach().float()
    a, b = _factors_of(matrix.T if module.fan_in_fan_out else matrix, init, rank, module.scaling[adapter])
    whole_a, whole_b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    whole_a.copy_(torch.cat([a, a]).to(whole_a))
    whole_b.copy_(torch.cat([b, -b], dim=1).to(whole_b))
    for whole in (whole_a, whole_b):
        whole.requires_grad_(True)  # PEFT enables gradients for its active adapter only
    whole_a.register_hook(lambda gradient: torch.cat([gradient[:rank], torch.zeros_like(gradient[rank:])]))
    whole_b.register_hook(lambda gradient: torch.cat([gradient[:, :rank], torch.zeros_like(gradient[:, rank:])], dim=1))


def _factors_of(weight: torch.Tensor, init: str, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] as PEFT computes them from `weight` [out, in].

    PiSSA: weight = U·Σ·Vᵀ, A = (Σᵣ/scale)^½·Vᵣᵀ and B = Uᵣ·(Σᵣ/scale)^½, so that scale·B·A is the best approximation of
    rank r. OLoRA: weight = Q·R, A = Rᵣ and B = Qᵣ.
    """
    if init == "pissa":
        u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
        root = (sigma[:rank] / scale).sqrt()
        return root[:, None] * vt[:rank], u[:, :rank] * root
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


@torch.no_grad()
def input_directions(
    model: Any, names: Sequence[str], rank: int, batches: Sequence[Mapping[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """By module name, [rank, in]: the leading principal directions of the module's inputs over the batches' real tokens.

    Raises:
        ModelError: the batches have fewer tokens than `rank`.
    """
    analyses = {name: _Directions(rank) for name in names}
    for batch in batches:
        mask = batch["attention_mask"].bool()
        with ExitStack() as stack:
            for name, analysis in analyses.items():
                handle = model.get_submodule(name).register_forward_pre_hook(_seen_by(analysis, mask))
                stack.callback(handle.remove)
            model(**batch)
    return {name: analysis.rows() for name, analysis in analyses.items()}


def _seen_by(analysis: _Directions, mask: torch.Tensor) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
    """A hook on a module's inputs [batch, tokens, in]."""
    return lambda _, inputs: analysis.add(inputs[0][mask])


class _Directions:
    """PEFT's incremental principal component analysis, given enough rows at a time."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._analysis: Any = IncrementalPCA(n_components=rank, copy=True)
        self._waiting: list[torch.Tensor] = []
        self._is_fitted = False

    def add(self, rows: torch.Tensor) -> None:
        self._waiting.append(rows.float())
        if sum(map(len, self._waiting)) >= MIN_ROWS_PER_DIRECTION * self._rank:
            self._fit()

    def rows(self) -> torch.Tensor:
        """[rank, in]"""
        if not self._is_fitted:
            if sum(map(len, self._waiting)) < self._rank:
                raise ModelError(f"init=eva: {EVA_BATCHES} batches have fewer tokens than rank {self._rank}")
            self._fit()
        found: torch.Tensor = self._analysis.components_
        return found

    def _fit(self) -> None:
        self._analysis.partial_fit(torch.cat(self._waiting))
        self._waiting = []
        self._is_fitted = True
