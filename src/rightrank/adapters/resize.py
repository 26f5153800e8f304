"""`resize`: an adapter at other ranks, by one rank for all modules, by energy, by noise, or by held-out data (`held_out`)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rightrank.adapters.rewrite import RankChoice, require_plain_update, write_resized
from rightrank.adapters.spectra import inspect_adapter
from rightrank.data.files import UnreadableError, read_json_object, replacing_folder, require_absent, write_text
from rightrank.data.rows import read_rows
from rightrank.models.adapter_files import AdapterFolder, open_adapter
from rightrank.models.base_models import is_weight_folder, load_base, require_base
from rightrank.models.places import BASE_FILE, CONFIG_FILE
from rightrank.models.spectra import energy_rank, factored_singular_values
from rightrank.models.weights import open_weights
from rightrank.schema.errors import ModelError, RunFolderError, SettingsError, first_line
from rightrank.schema.events import Evaluating
from rightrank.schema.results import Resized, ResizedTogether
from rightrank.schema.settings import DtypeName, SelectSettings, make_settings
from rightrank.train.targets import without_peft_noise

CONVERTED = ("LOHA", "LOKR", "VERA")  # methods that PEFT writes as LoRA of linear layers
ENERGY = 0.9999999  # of a converted update that its LoRA keeps
MANY_EXAMPLES = 2000  # above which scoring may take long, and fewer are proposed


@dataclass(frozen=True, slots=True)
class ResizeRule:
    """The rule that chooses the rank: exactly one of `rank`, `energy`, `noise` and `data`."""

    rank: int | None = None
    energy: float | None = None
    noise: bool = False
    data: Path | None = None

    def require_one(self) -> None:
        """Raise `SettingsError` unless exactly one is given."""
        given = [
            name
            for name, value in (("--rank", self.rank), ("--energy", self.energy), ("--data", self.data))
            if value is not None
        ]
        given += ["--noise"] if self.noise else []
        if len(given) != 1:
            raise SettingsError(
                f"{' and '.join(given) or 'no rule'} given; give exactly one of --rank, --energy, --noise and --data"
            )


@dataclass(frozen=True, slots=True)
class ResizeOptions:
    """Options besides the rule. All but `dtype` and `uniform` have an effect only with data."""

    dtype: DtypeName | None = None  # of the written tensors; None keeps theirs
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
    """Write the adapter in `path` at other ranks to `out`; one of LoHa, LoKr or VeRA as the LoRA that PEFT makes of it.

    Raises:
        InputError: the adapter, the rule, the data or `out` cannot be used; nothing is written.
        RunError: recovery diverged.
    """
    require_absent(out)
    kind = _method(path)
    if kind not in CONVERTED:
        return _resize(open_adapter(path), out, rule, options)
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        converted = Path(name) / path.name
        _convert(path, converted, options)
        found = _resize(open_adapter(converted), out, rule, options)
    note = f"converted from {kind} by PEFT, with {ENERGY:.5%} of its energy"
    return found.model_copy(update={"notes": [note, *found.notes]})


def _method(path: Path) -> str:
    """PEFT's name of the method of an adapter folder; empty where it has none."""
    try:
        return str(read_json_object(path / CONFIG_FILE).get("peft_type", ""))
    except UnreadableError:
        return ""


def _convert(path: Path, out: Path, options: ResizeOptions) -> None:
    """Write an adapter of another method as LoRA, which needs its base.

    Raises:
        ModelError: no base is known, it is another, or PEFT can't convert the adapter.
    """
    from peft import PeftModel, save_as_lora

    name = options.base or read_json_object(path / CONFIG_FILE).get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{path}: names no base model, which its conversion to LoRA needs; give one with --base MODEL")
    loaded = load_base(str(name), options.settings, None)
    require_base(path, loaded)
    try:
        with without_peft_noise():
            model: Any = PeftModel.from_pretrained(loaded.model, str(path))
            save_as_lora(out, model, rank=ENERGY)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: PEFT can't convert it to LoRA ({first_line(error)})") from None
    config = read_json_object(out / CONFIG_FILE) | {"base_model_name_or_path": loaded.name}
    write_text(out / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    write_text(out / BASE_FILE, loaded.identity.content().decode())


def _resize(adapter: AdapterFolder, out: Path, rule: ResizeRule, options: ResizeOptions) -> Resized:
    require_plain_update(adapter)
    if rule.data is None and options.base is not None and is_weight_folder(Path(options.base)):
        require_base(adapter.path, open_weights(Path(options.base)))
    if rule.data is None:
        return write_resized(adapter, out, _choice(adapter, rule, options), options.dtype, base=options.base)
    return _by_data(adapter, out, rule.data, options)


def resize_together(paths: Sequence[Path], out: Path, rule: ResizeRule, options: ResizeOptions) -> ResizedTogether:
    """Several adapters at one common rank, each in a folder of its name under `out`.

    The common rank is that of the rule, or the largest that any module of any adapter needs: the `max_lora_rank` of a
    server.

    Raises:
        InputError: one of them cannot be used, or two have the same name; nothing is written.
    """
    require_absent(out)
    if rule.data is not None:
        raise SettingsError(
            "--data measures one adapter on its own data; `rightrank fleet` measures several and brings them to one rank"
        )
    adapters = open_together(paths)
    choices = [_choice(adapter, rule, options) for adapter in adapters]
    rank = max(max(choice.ranks.values()) for choice in choices)
    for adapter in adapters:
        by_rank(adapter, rank)  # refuses a rank above a module's limit before anything is written

    def write(place: int, folder: Path) -> Resized:
        return write_resized(adapters[place], folder, _uniform(choices[place], rank), options.dtype, base=options.base)

    return ResizedTogether(rank=rank, adapters=write_together(adapters, out, write))


def open_together(paths: Sequence[Path]) -> list[AdapterFolder]:
    """Adapters that are written beside each other.

    Raises:
        InputError: one of them cannot be used, or two have the same name.
    """
    names = folder_names(paths)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingsError(
            f"two adapters are in folders named {twice!r}; rename one, since OUT gets one folder for each adapter"
        )
    adapters = [open_adapter(path) for path in paths]
    for adapter in adapters:
        require_plain_update(adapter)
    return adapters


def folder_names(paths: Sequence[Path]) -> list[str]:
    """The name under which each adapter is written: that of its folder, of its run where several are called `adapter`.

    Other folders of one name get that of the folder around them in front.
    """
    places = [path.resolve() for path in paths]
    names = [place.name for place in places]
    return [
        name if names.count(name) == 1 else place.parent.name if name == "adapter" else f"{place.parent.name}-{name}"
        for place, name in zip(places, names, strict=True)
    ]


def write_together(
    adapters: Sequence[AdapterFolder],
    out: Path,
    write: Callable[[int, Path], Resized],
    further: Callable[[Path], None] = lambda _: None,
) -> list[Resized]:
    """Write every adapter to a folder of its name under `out`, whole or not at all.

    Args:
        write: writes the adapter at a place of `adapters` to a folder.
        further: writes what else belongs into `out`.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{out}: cannot write there ({error.strerror or error}); give a writable folder") from None
    names = folder_names([adapter.path for adapter in adapters])
    with replacing_folder(out) as temporary:
        written = [write(place, temporary / name) for place, name in enumerate(names)]
        further(temporary)
    return [one.model_copy(update={"out": str(out / name)}) for one, name in zip(written, names, strict=True)]


def _choice(adapter: AdapterFolder, rule: ResizeRule, options: ResizeOptions) -> RankChoice:
    if rule.rank is not None:
        return by_rank(adapter, rule.rank)
    choice = _by_noise(adapter) if rule.noise else _by_energy(adapter, rule.energy or 0.0)
    return _uniform(choice, max(choice.ranks.values())) if options.uniform else choice


def _uniform(choice: RankChoice, rank: int) -> RankChoice:
    return replace(choice, ranks=dict.fromkeys(choice.ranks, rank))


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


def _by_noise(adapter: AdapterFolder) -> RankChoice:
    """The number of singular values above the optimal hard threshold; a module where the noise is unclear keeps its rank."""
    ranks: dict[str, int] = {}
    unclear: list[str] = []
    for module, found in zip(adapter.modules, inspect_adapter(adapter.path).modules, strict=True):
        ranks[module.name] = max(1, found.noise_rank)
        if "noise_unclear" in found.flags:
            ranks[module.name] = module.rank
            unclear.append(module.name)
    notes = (
        (f"{len(unclear)} module(s) keep their rank, with too few singular values to estimate the noise",)
        if unclear
        else ()
    )
    return RankChoice(ranks, "noise", notes)


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
        options.dtype,
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
