"""`resize`: an adapter at other ranks, by one rank for all modules, by energy, or by held-out data (`held_out`)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rightrank.adapters.rewrite import RankChoice, require_plain_update, write_resized
from rightrank.adapters.spectra import energy_rank, factored_singular_values
from rightrank.data.files import require_absent
from rightrank.data.rows import read_rows
from rightrank.models.adapter_files import AdapterFolder, open_adapter
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.events import Evaluating
from rightrank.schema.results import Resized
from rightrank.schema.settings import SelectSettings, make_settings

MANY_EXAMPLES = 2000  # above which scoring may take long, and fewer are proposed


@dataclass(frozen=True, slots=True)
class ResizeRule:
    """The rule that chooses the rank: exactly one of `rank`, `energy` and `data`."""

    rank: int | None = None
    energy: float | None = None
    data: Path | None = None

    def require_one(self) -> None:
        """Raise `SettingsError` unless exactly one is given."""
        rules = (("--rank", self.rank), ("--energy", self.energy), ("--data", self.data))
        given = [name for name, value in rules if value is not None]
        if len(given) != 1:
            raise SettingsError(
                f"{' and '.join(given) or 'no rule'} given; give exactly one of --rank, --energy and --data"
            )


@dataclass(frozen=True, slots=True)
class ResizeOptions:
    """Options besides the rule. All but `uniform` have an effect only with data."""

    uniform: bool = False  # one rank for all modules, the largest that any of them needs
    base: str | None = None  # the base model; None for the one that the adapter names
    settings: SelectSettings = field(default_factory=lambda: make_settings({}))
    ranks: Sequence[int] | None = None  # candidates; None for the powers of two
    recover_steps: int = 0
    learning_rate: float | None = None  # of recovery
    on_rank: Callable[[int, float], None] = lambda _rank, _value: None
    # what the adapter was trained on: left out of the scores, and read for K-FAC and recovery
    train: Path | None = None
    notice: Callable[[str], None] = lambda _: None  # receives each line for a person
    on_event: Callable[[Evaluating], None] = lambda _: None


def resize_adapter(path: Path, out: Path, rule: ResizeRule, options: ResizeOptions) -> Resized:
    """Write the adapter in `path` at other ranks to `out`.

    Raises:
        InputError: the adapter, the rule, the data or `out` cannot be used; nothing is written.
        RunError: recovery diverged.
    """
    require_absent(out)
    adapter = open_adapter(path)
    require_plain_update(adapter)
    if rule.data is not None:
        return _by_data(adapter, out, rule.data, options)
    return write_resized(adapter, out, _choice(adapter, rule, options))


def _choice(adapter: AdapterFolder, rule: ResizeRule, options: ResizeOptions) -> RankChoice:
    if rule.rank is not None:
        return by_rank(adapter, rule.rank)
    choice = _by_energy(adapter, rule.energy or 0.0)
    largest = max(choice.ranks.values())
    return replace(choice, ranks=dict.fromkeys(choice.ranks, largest)) if options.uniform else choice


def by_rank(adapter: AdapterFolder, rank: int) -> RankChoice:
    """One rank for all modules.

    Raises:
        SettingsError: below 1, or above the limit of a module's ΔW.
    """
    if rank < 1:
        raise SettingsError(f"--rank {rank} is not allowed: give a whole number from 1")
    for module in adapter.modules:
        if rank > max(module.rank, min(module.rows, module.columns)):
            raise SettingsError(
                f"--rank {rank} is above the {min(module.rows, module.columns)} that {module.name} "
                f"({module.rows} × {module.columns}) can have; give a lower rank"
            )
    return RankChoice({module.name: rank for module in adapter.modules}, f"rank {rank}")


def _by_energy(adapter: AdapterFolder, fraction: float) -> RankChoice:
    """The fewest singular values of each module with this fraction of its energy Σσ².

    Raises:
        SettingsError: `fraction` is not above 0 and up to 1.
    """
    if not 0 < fraction <= 1:
        raise SettingsError(f"--energy {fraction:g} is not allowed: give a fraction above 0 and up to 1, such as 0.99")
    ranks: dict[str, int] = {}
    for module in adapter.modules:
        s = factored_singular_values(*adapter.factors(module))
        ranks[module.name] = max(1, energy_rank(s, fraction) or module.rank)
    return RankChoice(ranks, f"energy {fraction:g}")


def _by_data(adapter: AdapterFolder, out: Path, data: Path, options: ResizeOptions) -> Resized:
    # Only a measurement needs these heavy imports.
    from rightrank.adapters.held_out import Candidates, Recovery, resize_by_data, scored_data
    from rightrank.train.adapter_runtime import DataUse, adapter_runtime

    if options.recover_steps and options.learning_rate is None:
        raise SettingsError("--recover needs --learning-rate; give the one that the adapter was trained at")
    if not any(module.scaling for module in adapter.modules):
        raise ModelError(
            f"{adapter.path}: lora_alpha is 0, so that the adapter changes nothing; verl's merger writes 0 where it does not know it: "
            "set it in adapter_config.json"
        )
    ranks = candidate_ranks(adapter, options.ranks)
    if options.recover_steps and options.train is None and None in read_rows(data):
        options = replace(options, train=data)  # recovery needs training examples: the split that select makes
    scored = scored_data(adapter, data, options.train, options.settings)
    options.notice(scored.note)
    measured = ", ".join(map(str, sorted(ranks, reverse=True)))
    count = len(scored.splits.examples["selection"])
    fewer = "" if count <= MANY_EXAMPLES else "; --set eval_items=1000 measures on fewer"
    options.notice(f"measuring the base, then ranks {measured}, each on {count:,} examples{fewer}")
    recovery = Recovery(options.recover_steps, options.learning_rate) if options.learning_rate else None
    candidates = Candidates(
        ranks,
        recovery if options.recover_steps else None,
        options.on_rank,
        by_halves=scored.scores_training_examples,
        on_event=options.on_event,
    )
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        use = DataUse(data, options.settings, Path(name) / "cache", options.recover_steps, scored.splits)
        runtime = adapter_runtime(adapter, options.base, use)
        resized = resize_by_data(adapter, out, runtime, candidates, Path(name))
    return resized.model_copy(update={"notes": [*resized.notes, scored.note], "scored_examples": count})


def candidate_ranks(adapter: AdapterFolder, asked: Sequence[int] | None = None) -> list[int]:
    """The ranks to measure: `asked`, or every power of two below the adapter's largest rank; and that rank.

    Raises:
        SettingsError: a rank above the adapter's.
    """
    top = adapter.rank
    if top == 1:
        raise SettingsError(
            f"{adapter.path}: its rank is 1, and there is no lower rank to measure; give an adapter of a higher rank"
        )
    if asked:
        for rank in asked:
            if not 1 <= rank <= top:
                raise SettingsError(f"rank {rank} cannot be reached by truncation; give ranks from 1 to {top}")
        return sorted({*asked, top})
    return sorted({2**power for power in range(top.bit_length()) if 2**power < top} | {top})
