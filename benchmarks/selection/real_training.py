"""Exhaustive grids on real models and texts: every rank × learning rate × seed is trained, with values during training.

    python -m benchmarks.selection.real_training NAME MODEL DATA --work FOLDER --out benchmarks/selection/real_grids.json.xz \\
        [--steps 80] [--seeds 1]

NAME is one of `GRIDS`. Its horizon and seeds can be changed, and new seeds join those in the file. Where the learning rate is
constant from the first step, a training stopped at half is a whole training of half the steps, so that one grid gives two
curves, one for each horizon. A curve has values at an eighth, a quarter and half, example losses, and the truncations of the
top rank's adapters. Where the horizon is the whole training, it also has what the search for the learning rate measures at an
eighth (running means and annealed copies), and values on the test split, which chose nothing.
FOLDER keeps finished trainings and readings, and the same command resumes. Incomplete seeds are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.machine import machine
from benchmarks.results import read_json, write_json
from rightrank.data.splits import load_data
from rightrank.models.base_models import load_base
from rightrank.runs.folder import RunFolder
from rightrank.runs.local import LocalExecutor
from rightrank.schema.events import Listener
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import (
    Arm,
    Trial,
    TrialDiverged,
    TrialFailed,
    TrialFinished,
    TrialOutcome,
    content_hash,
    trial_id,
)
from rightrank.search.bracket import outside_in
from rightrank.search.history import Space, base_arm, space_of
from rightrank.search.learning_rates import ANNEAL, LOOK
from rightrank.train.optimizer import load_checkpoint
from rightrank.train.runtime import Runtime, adapter_attached
from rightrank.train.tokens import encode

RANKS = (1, 4, 16, 64)
SEEDS = (0, 1)
DIGITS = 5
SEEDED = (  # parts of a curve that have a value for every seed
    "seed_grid",
    "checkpoints",
    "losses",
    "averaged",
    "annealed",
    "truncation_grid",
    "truncation_items",
    "item_losses",
    "test_grids",
    "test_items",
    "checkpoint_items",
    "train_losses",
)
CHECKPOINTS = (LOOK, 0.25, 0.5)  # of a horizon

COMMON = {
    "ranks": RANKS,
    "seeds": SEEDS,
    "eval_points": 1,  # stages bring their own
    "device": "cpu",
}
CAUSAL = {"layers_to_transform": (28, 29), "max_steps": 40, "seq_len": 48, "eval_items": 96}
ENCODER = {"layers_to_transform": (4, 5), "max_steps": 80, "seq_len": 48, "eval_items": 300}
CONSTANT = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
LONG = {"seeds": (0, 1, 2), "max_steps": 400, "eval_batch_size": 32}
ENCODER_LONG = {"layers_to_transform": (4, 5), "seq_len": 64, "eval_items": 400}
CAUSAL_LONG = {"layers_to_transform": (28, 29), "seq_len": 32, "eval_items": 300, "dtype": "bfloat16"}
FEW = {"test_fraction": 0.35, "validation_fraction": 0.35}  # of 1,200 rows
GRIDS: dict[str, dict[str, object]] = {
    "packages": COMMON | CAUSAL | CONSTANT | {"learning_rates": (1e-3, 3e-3, 1e-2)},
    "glosses": COMMON | CAUSAL | {"learning_rates": (1e-3, 3e-3, 1e-2)},
    "docstrings": COMMON | CAUSAL | {"learning_rates": (1e-3, 3e-3, 1e-2), "seq_len": 128},
    "movies": COMMON | ENCODER | {"learning_rates": (3e-4, 1e-3, 3e-3)},
    "senses": COMMON | ENCODER | {"learning_rates": (3e-4, 1e-3, 3e-3, 1e-2)},
    "senses_long": COMMON | LONG | ENCODER_LONG | {"learning_rates": (3e-4, 1e-3, 3e-3)},
    "movies_long": COMMON | LONG | ENCODER_LONG | {"learning_rates": (3e-4, 1e-3, 3e-3)},
    "newsgroups_long": COMMON | LONG | ENCODER_LONG | {"learning_rates": (3e-4, 1e-3, 3e-3), "metric": "accuracy"},
    "senses_few": COMMON | LONG | ENCODER_LONG | FEW | {"learning_rates": (1e-4, 3e-4, 1e-3)},
    "glosses_long": COMMON | LONG | CAUSAL_LONG | {"learning_rates": (1e-3, 3e-3)},
    "packages_long": COMMON | LONG | CAUSAL_LONG | {"learning_rates": (1e-3, 3e-3)},
}


def changed(settings: SelectSettings) -> dict[str, Any]:
    """The settings whose values are not the defaults, as JSON."""
    values, rows = settings.model_dump(mode="json"), settings.model_fields
    return {name: value for name, value in values.items() if getattr(settings, name) != rows[name].default}


def horizons(settings: SelectSettings) -> tuple[float, ...]:
    """Parts of the trainings' steps that are whole trainings."""
    return (0.5, 1.0) if settings.lr_scheduler_type == "constant" else (1.0,)


def stages(settings: SelectSettings, checkpoints: Sequence[float] = CHECKPOINTS) -> list[float]:
    """Where trainings are stopped and evaluated: the checkpoints of every horizon, and its end."""
    return sorted({part * horizon for horizon in horizons(settings) for part in (*checkpoints, 1.0)})


@dataclass(frozen=True)
class Workshop:
    """A loaded model, its data, and the outcomes so far; everything new goes into the journal at once."""

    settings: SelectSettings
    folder: RunFolder
    runtime: Runtime
    executor: LocalExecutor
    fingerprint: str
    outcomes: dict[Arm, TrialOutcome]
    space: Space
    checkpoints: tuple[float, ...] = CHECKPOINTS

    def run(self, arm: Arm) -> TrialOutcome:
        if arm not in self.outcomes:
            base = self.outcomes.get(base_arm(self.settings.lora_alpha))
            base_loss = base.metrics["loss"] if isinstance(base, TrialFinished) else None
            trial = Trial(trial_id=trial_id(self.fingerprint, arm), arm=arm)
            for outcome in self.executor.run([trial], base_loss):
                self.folder.journal.append(outcome)
                self.outcomes[arm] = outcome
            print(arm.label(), getattr(self.outcomes[arm], "value", self.outcomes[arm].type), flush=True)
        return self.outcomes[arm]


def open_workshop(
    model: str, data: Path, settings: SelectSettings, work: Path, checkpoints: tuple[float, ...] = CHECKPOINTS
) -> Workshop:
    assert settings.max_steps is not None
    splits = load_data(data, settings)
    loaded = load_base(model, settings, splits.summary.classes)
    encoded = encode(splits, loaded, settings)
    work.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(work)
    runtime = Runtime(loaded, encoded, settings, settings.max_steps, folder.cache)
    known = [o for o in folder.journal.read() if isinstance(o, TrialFinished | TrialDiverged | TrialFailed)]
    fingerprint = content_hash(
        {"settings": settings.model_dump(mode="json"), "model": loaded.fingerprint, "data": splits.fingerprint}
    )
    executor = LocalExecutor(runtime, folder, Listener())
    outcomes: dict[Arm, TrialOutcome] = {outcome.arm: outcome for outcome in known}
    unseen_steps = max(0, len(runtime.data.splits["train"]) // settings.items_per_step - settings.max_steps)
    space = space_of(settings, settings.max_steps, unseen_steps=unseen_steps)
    return Workshop(settings, folder, runtime, executor, fingerprint, outcomes, space, checkpoints)


def train_grid(shop: Workshop) -> None:
    """Seed by seed, so that what is there when time ends is whole; truncations as soon as a top rank's adapter is there."""
    settings = shop.settings
    shop.run(base_arm(settings.lora_alpha))
    for seed in settings.seeds:
        for rate in settings.learning_rates:
            for rank in outside_in(settings.ranks):
                staged = train_in_stages(shop, rank, rate, seed)
                if rank == max(settings.ranks):
                    for parent in staged.values():
                        for cut in cuts_of(shop, parent):
                            shop.run(cut)


def train_in_stages(shop: Workshop, rank: int, rate: float, seed: int) -> dict[float, TrialFinished]:
    """Part of a training → its outcome there; nothing after a divergence."""
    steps = shop.settings.max_steps
    assert steps is not None
    found: dict[float, TrialFinished] = {}
    before: str | None = None
    for part in stages(shop.settings, shop.checkpoints):
        arm = Arm(
            rank=rank,
            learning_rate=rate,
            lora_alpha=shop.settings.lora_alpha,
            seed=seed,
            steps=steps,
            stop_at=None if part == 1.0 else round(part * steps),
            continue_from=before,
        )
        outcome = shop.run(arm)
        if not isinstance(outcome, TrialFinished):
            break
        found[part], before = outcome, outcome.trial_id
        if part == LOOK and LOOK in shop.checkpoints:
            step = round(LOOK * steps)
            end = step + max(1, round(ANNEAL * steps))
            shop.run(arm.model_copy(update={"stop_at": end, "continue_from": before, "anneal_from": step}))
    return found


def cuts_of(shop: Workshop, parent: TrialFinished) -> Iterator[Arm]:
    """The adapter of a whole or half training truncated to every lower rank."""
    ends = [round(horizon * parent.steps) for horizon in horizons(shop.settings)]
    if (parent.stop_at or parent.steps) not in ends:
        return
    if parent.stop_at is not None:
        write_adapter_of_checkpoint(shop.folder, parent.trial_id)
    for rank in shop.settings.ranks:
        if rank < parent.rank:
            yield parent.arm.model_copy(
                update={
                    "rank": rank,
                    "steps": 0,
                    "stop_at": None,
                    "continue_from": None,
                    "truncate_from": parent.trial_id,
                }
            )


def test_grids(shop: Workshop, seeds: set[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of every trained and truncated adapter of a whole training: values on the test split, and those of its examples.

    The examples' values are summed losses, or scores; `tests.json` keeps both.
    """
    kept = shop.folder.path / "tests.json"
    known: dict[str, list[Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    learning_rates = {o.trial_id: o.learning_rate for o in shop.outcomes.values() if isinstance(o, TrialFinished)}
    values: dict[str, Any] = {"trained": {}, "truncated": {}}
    items: dict[str, Any] = {kind: {} for kind in values}
    for outcome in shop.outcomes.values():
        if not isinstance(outcome, TrialFinished) or outcome.rank == 0 or outcome.stop_at is not None:
            continue
        identity, parent = outcome.trial_id, outcome.truncate_from
        if outcome.seed not in seeds or (parent is not None and parent not in learning_rates):
            continue
        if identity not in known:
            with adapter_attached(shop.runtime, shop.folder.trial_adapter(identity)):
                found = shop.runtime.evaluate("test")
            name = shop.settings.metric_name
            scores = found.by_example.get(name, found.losses)
            known[identity] = [round(found.metrics[name], DIGITS), [round(score, 3) for score in scores]]
            kept.write_text(json.dumps(known))
        kind = "trained" if parent is None else "truncated"
        learning_rate = outcome.learning_rate if parent is None else learning_rates[parent]
        value, scores = known[identity]
        place(values[kind], outcome.rank, learning_rate, outcome.seed, value)
        place(items[kind], outcome.rank, learning_rate, outcome.seed, scores)
    return values, items


def write_adapter_of_checkpoint(folder: RunFolder, identity: str) -> None:
    """A stopped training leaves a checkpoint; a truncation reads an adapter's file."""
    target = folder.trial_adapter(identity) / "adapter_model.safetensors"
    checkpoint = load_checkpoint(folder.checkpoint(identity))
    if target.exists() or checkpoint is None:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = "parameter."
    tensors = {
        name.removeprefix(prefix).replace(".default", ""): value.contiguous()
        for name, value in checkpoint[0].items()
        if name.startswith(prefix)
    }
    save_file(tensors, target)


def curve_of(name: str, shop: Workshop, horizon: float, extra: Mapping[str, object]) -> dict[str, Any]:
    """The grid at a horizon: a part of the trainings' steps."""
    steps = shop.settings.max_steps
    assert steps is not None
    wanted = round(horizon * steps)
    name_of_metric = shop.settings.metric_name
    seeds = whole_seeds(shop)
    finished = [o for o in shop.outcomes.values() if isinstance(o, TrialFinished) and o.rank > 0 and o.seed in seeds]
    trained = [o for o in finished if o.truncate_from is None and o.arm.anneal_from is None]
    whole = sorted(
        (o for o in trained if (o.stop_at or o.steps) == wanted), key=lambda o: (o.rank, o.learning_rate, o.seed)
    )
    parents = {o.trial_id: o for o in whole}
    cuts = [o for o in finished if o.truncate_from in parents]
    tops = [o for o in whole if o.rank == max(shop.settings.ranks)]

    def at(part: float) -> list[TrialFinished]:
        return [o for o in trained if (o.stop_at or o.steps) == round(part * wanted)]

    def grid_of(outcomes: Iterable[TrialFinished], value: Callable[[TrialFinished], Any]) -> dict[str, Any]:
        """By rank, learning rate (of a truncation: its parent's) and seed."""
        grid: dict[str, Any] = {}
        for outcome in outcomes:
            learning_rate = parents.get(outcome.truncate_from or "", outcome).learning_rate
            place(grid, outcome.rank, learning_rate, outcome.seed, value(outcome))
        return grid

    def value_of(outcome: TrialFinished) -> float:
        return round(outcome.value, DIGITS)

    def loss_of(outcome: TrialFinished) -> float:
        return round(outcome.metrics["loss"], DIGITS)

    def scores_of(outcome: TrialFinished) -> list[float]:
        """Summed losses of the examples, or their scores."""
        found = outcome.items(name_of_metric)
        assert found is not None
        return [round(score, 3) for score in found[0]]

    grid = grid_of(whole, value_of)
    annealed = grid_of((o for o in finished if o.arm.anneal_from is not None), loss_of)
    base = shop.outcomes[base_arm(shop.settings.lora_alpha)]
    assert isinstance(base, TrialFinished)
    return {
        "id": f"{name}_{wanted}_steps",
        "family": "real",
        "source": "benchmarks/selection/real_training.py",
        **extra,
        "steps": wanted,
        "machine": machine(),
        "seeds": sorted(seeds),
        "ranks": list(shop.settings.ranks),
        "metric": name_of_metric,
        "higher_is_better": name_of_metric == "accuracy",
        "base": round(base.value, DIGITS),
        "base_loss": round(base.metrics["loss"], DIGITS),
        "item_tokens": base.item_tokens if name_of_metric == "loss" else [],
        "seed_grid": grid,
        "lr_grid": means_of(grid),
        "checkpoints": {f"{part:g}": grid_of(at(part), value_of) for part in shop.checkpoints},
        "losses": {}
        if name_of_metric == "loss"
        else {f"{part:g}": grid_of(at(part), loss_of) for part in (*shop.checkpoints, 1.0)},
        "annealed": {f"{LOOK:g}": annealed} if annealed else {},
        "truncation_grid": grid_of([*cuts, *tops], value_of),
        "truncation_items": grid_of(cuts, scores_of),
        "item_losses": grid_of(whole, scores_of),
        "seconds": round(sum(o.train_seconds + o.eval_seconds for o in whole), 1),
    }


def whole_seeds(shop: Workshop) -> set[int]:
    """Seeds of which every rank and learning rate has ended, well or not, at the full horizon."""
    settings = shop.settings
    assert settings.max_steps is not None
    cells: dict[int, set[tuple[int, float]]] = {}
    for arm, outcome in shop.outcomes.items():
        if (
            arm.rank > 0
            and arm.truncate_from is None
            and arm.anneal_from is None
            and (arm.is_direct or not isinstance(outcome, TrialFinished))
        ):
            cells.setdefault(arm.seed, set()).add((arm.rank, arm.learning_rate))
    return {seed for seed, found in cells.items() if len(found) == len(settings.ranks) * len(settings.learning_rates)}


def place(grid: dict[str, Any], rank: int, rate: float, seed: int, value: object) -> None:
    grid.setdefault(str(rank), {}).setdefault(f"{rate:g}", {})[str(seed)] = value


def store(curves: list[dict[str, Any]], out: Path) -> None:
    known = read_json(out)["curves"] if out.exists() else []
    merged = {curve["id"]: curve for curve in known}
    for curve in curves:
        merged[curve["id"]] = with_seeds_of(curve, merged[curve["id"]]) if curve["id"] in merged else curve
    write_json({"curves": list(merged.values())}, out)


def with_seeds_of(curve: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """`curve` with the seeds that only the known one of the same setting has."""
    assert isclose(curve["base"], known["base"], rel_tol=1e-3), (
        f"{curve['id']}: the stored base loss {known['base']} is of another setting"
    )
    missing = {str(seed) for seed in set(known["seeds"]) - set(curve["seeds"])}

    def joined(new: Any, old: Any) -> Any:
        if not isinstance(old, dict):
            return new
        taken = {key: old[key] for key in old if key not in new and (key in missing or isinstance(old[key], dict))}
        return {key: joined(new[key], old[key]) if key in old else new[key] for key in new} | taken

    found = curve | {"seeds": sorted({*curve["seeds"], *known["seeds"]})}
    for part in SEEDED:
        if part in curve:
            found[part] = joined(curve[part], known.get(part, {}))
    found["lr_grid"] = means_of(found["seed_grid"])
    found["settings"] = curve["settings"] | {"seeds": found["seeds"]}
    found["seconds"] = round(curve["seconds"] + (known["seconds"] if missing else 0.0), 1)
    return found


def means_of(seed_grid: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Over seeds."""
    return {
        rank: {rate: round(sum(by_seed.values()) / len(by_seed), DIGITS) for rate, by_seed in by_rate.items()}
        for rank, by_rate in seed_grid.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=GRIDS)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="of a whole training")
    parser.add_argument("--seeds", help="such as 0,1")
    parser.add_argument("--store-only", action="store_true", help="train nothing: store what is whole")
    options = parser.parse_args()
    torch.set_num_threads(1)
    own: dict[str, object] = {} if options.steps is None else {"max_steps": options.steps}
    if options.seeds is not None:
        own["seeds"] = tuple(int(seed) for seed in options.seeds.split(","))
    settings = SelectSettings(**GRIDS[options.name] | own)
    shop = open_workshop(options.model, options.data, settings, options.work)
    if not options.store_only:
        train_grid(shop)
    extra = {"model": Path(options.model).name, "settings": changed(settings)}
    curves = [curve_of(options.name, shop, horizon, extra) for horizon in horizons(settings)]
    curves[-1]["test_grids"], _ = test_grids(shop, set(curves[-1]["seeds"]))
    store(curves, options.out)


if __name__ == "__main__":
    main()
