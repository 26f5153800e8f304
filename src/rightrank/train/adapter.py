"""One arm's adapter on the base: added by PEFT, initialised from the seed's draw, and removed again.

Rank r takes the first r rows of the draw of each module's A, so arms of one seed differ only in their further rows. The
distributions are PEFT's: A is uniform in ±1/√in_features (`default`) or normal with standard deviation 1/r (`gaussian`),
and B is zero. The kind of a module says which tensors these are (`rightrank.models.kinds`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.incremental_pca import IncrementalPCA

from rightrank.interop.servers import max_module_rank
from rightrank.models.kinds import kind_of
from rightrank.models.kinds.base import Draw
from rightrank.models.patterns import exact_pattern, lora_scaling, pattern_value
from rightrank.models.truncation import Moments, load_moments, module_ranks, truncated_tensors
from rightrank.schema.errors import ModelError
from rightrank.schema.settings import Scaling, SelectSettings
from rightrank.schema.trials import Arm
from rightrank.schema.variants import FROM_WEIGHTS, lora_scale
from rightrank.train.targets import without_peft_noise

PREFIX, COUNT = "average.", "average_count"


class RunningMean:
    """The mean of named parameters over the steps after `start`, in float32."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], start: int) -> None:
        self._parameters = parameters
        self._start = start
        self._sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()}
        self._count = 0

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Count the parameters as they are after `step` steps; steps up to `start` are left out."""
        if step <= self._start:
            return
        for name, value in self._parameters.items():
            self._sums[name] += value
        self._count += 1

    @property
    def is_empty(self) -> bool:
        return self._count == 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold their mean inside the block, and their own values after it."""
        before = {name: value.detach().clone() for name, value in self._parameters.items()}
        with torch.no_grad():
            for name, value in self._parameters.items():
                value.copy_(self._sums[name] / self._count)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in self._parameters.items():
                    value.copy_(before[name])

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        sums = {f"{PREFIX}{name}": value for name, value in self._sums.items()}
        return {**sums, COUNT: torch.tensor(self._count)}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Resume from a checkpoint's tensors; one written without a mean leaves it empty."""
        if COUNT not in tensors:
            return
        for name, value in self._sums.items():
            value.copy_(tensors[f"{PREFIX}{name}"])
        self._count = int(tensors[COUNT])


EVA_BATCHES = 8  # training batches whose inputs are analysed
MIN_ROWS_PER_DIRECTION = 2  # before a step of the incremental analysis

Pair = tuple[torch.Tensor, torch.Tensor]


def start_from_weights(module: Any, adapter: str, init: str, rank: int) -> None:
    """Set an adapted module's A [2r, in] and B [out, 2r] from its base weight; the second half gets no gradient.

    Raises:
        ModelError: the weight is quantised.
    """
    weight = module.get_base_layer().weight
    if not weight.is_floating_point() or weight.dim() != 2:
        raise ModelError(f"init={init} needs the base's unquantised weights; load the base in 16 or 32 bits")
    matrix = weight.detach().float()
    a, b = factors_of(matrix.T if module.fan_in_fan_out else matrix, init, rank, module.scaling[adapter])
    whole_a, whole_b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    whole_a.copy_(torch.cat([a, a]).to(whole_a))
    whole_b.copy_(torch.cat([b, -b], dim=1).to(whole_b))
    for whole in (whole_a, whole_b):
        whole.requires_grad_(True)  # PEFT enables gradients for its active adapter only
    whole_a.register_hook(lambda gradient: torch.cat([gradient[:rank], torch.zeros_like(gradient[rank:])]))
    whole_b.register_hook(lambda gradient: torch.cat([gradient[:, :rank], torch.zeros_like(gradient[:, rank:])], dim=1))


def factors_of(weight: torch.Tensor, init: str, rank: int, scale: float) -> Pair:
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
        with _inputs_seen(model, names, lambda name, rows, mask=mask: analyses[name].add(rows[mask])):  # type: ignore[misc]
            model(**batch)
    return {name: analysis.rows() for name, analysis in analyses.items()}


class _Directions:
    """PEFT's incremental principal component analysis, given enough rows at a time."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._analysis: Any = IncrementalPCA(n_components=rank, copy=True)
        self._waiting: list[torch.Tensor] = []
        self._is_fitted = False

    def add(self, rows: torch.Tensor) -> None:
        self._waiting.append(rows.float())
        if sum(len(part) for part in self._waiting) >= MIN_ROWS_PER_DIRECTION * self._rank:
            self._fit()

    def rows(self) -> torch.Tensor:
        """[rank, in]"""
        if not self._is_fitted:
            if sum(len(part) for part in self._waiting) < self._rank:
                raise ModelError(f"init=eva: {EVA_BATCHES} batches have fewer tokens than rank {self._rank}")
            self._fit()
        found: torch.Tensor = self._analysis.components_
        return found

    def _fit(self) -> None:
        self._analysis.partial_fit(torch.cat(self._waiting))
        self._waiting = []
        self._is_fitted = True


@contextmanager
def _inputs_seen(model: Any, names: Sequence[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Within the block, `see` receives the inputs [batch, tokens, in] of every pass of the named modules."""

    def hook_of(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        return lambda _, inputs: see(name, inputs[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(hook_of(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


ADAPTER = "default"  # PEFT's name for the only adapter of a model


@contextmanager
def attached(
    model: Any, settings: SelectSettings, arm: Arm, config: LoraConfig, rows: Mapping[str, torch.Tensor] | None = None
) -> Iterator[Any]:
    """The PeftModel of `arm` around `model`, freshly initialised. When the block ends the base is as it was before."""
    biases = trained_biases(model, settings)
    with seeded(arm.seed):
        peft_model = wrapped(model, config)
    try:
        initialise(peft_model, arm, arm.init_lora_weights or settings.init_lora_weights, rows=rows)
        adapters_in_training(peft_model)
        yield peft_model
    finally:
        unwrapped(peft_model, biases)


def adapters_in_training(peft_model: Any) -> None:
    """Put PEFT's layers and their dropout in training mode; the layers of the base keep theirs."""
    for module in lora_modules(peft_model).values():
        module.training = True  # which DoRA asks for before it drops anything out
        module.lora_dropout.train()


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
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, module)
    base.requires_grad_(False)
    if hasattr(base, "peft_config"):
        del base.peft_config
    with torch.no_grad():
        for name, value in (biases or {}).items():
            base.get_parameter(name).copy_(value)
    return base


def initialise(
    peft_model: Any, arm: Arm, init: str, adapter: str = ADAPTER, rows: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Set the arm's adapter to its first values, by the kind of each module; `rows` gives the A of modules that do not draw it."""
    with torch.no_grad():
        for name, module in lora_modules(peft_model).items():
            if adapter not in module.lora_A and adapter not in module.lora_embedding_A:
                continue
            if adapter in module.lora_A and init in FROM_WEIGHTS:
                start_from_weights(module, adapter, init, arm.rank)
                continue
            kind_of(module).start(module, adapter, Draw(arm.seed, name, init))
            if rows is not None and name in rows:
                a = module.lora_A[adapter].weight
                a.copy_(rows[name].to(a))


def lora_modules(peft_model: Any) -> dict[str, Any]:
    """The adapted modules by their name in the base model."""
    base = peft_model.base_model.model
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def trainable_parameters(peft_model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in peft_model.named_parameters() if parameter.requires_grad}


def trained_biases(model: Any, settings: SelectSettings) -> dict[str, torch.Tensor]:
    """Copies of the base's biases, which PEFT trains in place if the `bias` setting says so; else empty."""
    if settings.bias == "none":
        return {}
    return {name: value.detach().clone() for name, value in model.named_parameters() if name.endswith("bias")}


@dataclass(frozen=True, slots=True)
class TrialFolders:
    checkpoint: Path  # file, while the trial runs
    adapter: Path  # folder, when it has finished
    continue_from: Path | None = None  # the checkpoint of the trial that this one resumes
    truncate_from: Path | None = None  # the adapter folder of the trial that this one truncates
    moments: Path | None = None  # file of the moments of that adapter (`engine.covariances`)
    answers: Path | None = None  # file for the model's answers to the held-out examples, if a metric needs them


def truncation_method(folders: TrialFolders) -> Literal["svd", "kfac"] | None:
    """The method that the adapter was truncated by; None if it was not."""
    if folders.truncate_from is None:
        return None
    return "kfac" if _moments(folders) else "svd"


def truncate(folders: TrialFolders, arm: Arm, scaling: Scaling, config: LoraConfig) -> dict[str, torch.Tensor]:
    """The tensors of a truncation, whose ranks go into `config`; none for an arm that starts from its first draw."""
    if folders.truncate_from is None:
        return {}
    scale, moments = partial(lora_scale, scaling, arm.lora_alpha), _moments(folders)
    uniform, alphas = dict(config.rank_pattern or {}), config.alpha_pattern or {}

    def rank_of(address: str) -> int:
        return int(pattern_value(uniform, address, config.r))

    def new_scale(address: str, rank: int) -> float:
        alpha = pattern_value(alphas, address, config.lora_alpha)
        return lora_scaling(alpha, rank, bool(config.use_rslora))

    ranks = module_ranks(folders.truncate_from, rank_of, max_module_rank(arm.rank), scale, moments)
    config.rank_pattern = exact_pattern(ranks, config.r, ranks)
    return truncated_tensors(folders.truncate_from, ranks, scale, new_scale, moments)


def _moments(folders: TrialFolders) -> dict[str, Moments]:
    """Those of the adapter to truncate, by module; none where they could not be gathered."""
    return {} if folders.moments is None else load_moments(folders.moments)
