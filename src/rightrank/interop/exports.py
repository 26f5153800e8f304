"""The export targets by name, and the function that writes one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rightrank.data.files import replacing_folder
from rightrank.decision.run import Records
from rightrank.interop.recipe import Recipe
from rightrank.interop.servers import llama_cpp, ollama, served_rank, sglang, vllm
from rightrank.interop.trainers import axolotl, diffusers, kohya, llamafactory, ms_swift, peft, trl, unsloth
from rightrank.interop.written import Written
from rightrank.schema.decision import Decision
from rightrank.schema.errors import MissingExtraError, ResultsError, SettingsError, did_you_mean
from rightrank.schema.trials import TrialCollapsed, TrialFinished, TrialOutcome

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

TARGET = "optuna"
FILE = "study.db"


def write_study(records: Records, decision: Decision | None, folder: Path) -> Exported:
    """Write `study.db` into `folder`, which is replaced. An unfinished run has a study too.

    Raises:
        MissingExtraError: optuna is not installed.
        ResultsError: no training has ended.
    """
    trained = [outcome for outcome in records.outcomes if outcome.rank > 0]
    if not trained:
        raise ResultsError("no training has ended yet; a study needs at least one")
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("an Optuna study needs an extra: pip install 'rightrank[optuna]'") from None
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with replacing_folder(folder) as temporary:
        storage = optuna.storages.RDBStorage(f"sqlite:///{temporary.resolve() / FILE}")
        study = optuna.create_study(
            storage=storage,
            study_name="rightrank",
            direction="maximize" if records.started.higher_is_better else "minimize",
        )
        for name, value in _study_attributes(records, decision).items():
            study.set_user_attr(name, value)
        study.add_trials([_frozen(outcome, trained, records.started.metric) for outcome in trained])
        storage.remove_session()  # the file is moved next
        storage.engine.dispose()
    optuna.logging.set_verbosity(before)
    notes = ["trainings that were stopped early and truncated adapters have the state pruned"]
    return Exported(TARGET, folder, [FILE], f"optuna-dashboard sqlite:///{FILE}", notes)


def _study_attributes(records: Records, decision: Decision | None) -> dict[str, Any]:
    base = next((trial for trial in records.finished() if trial.rank == 0), None)
    attributes: dict[str, Any] = {
        "metric": records.started.metric,
        "model": records.started.settings.get("model"),
        "data": records.started.settings.get("data"),
    }
    if base is not None:
        attributes["base"] = base.metrics
    if decision is not None:
        attributes |= {
            "rank": decision.rank,
            "verdict": decision.verdict,
            "margin": decision.margin,
            "answer": decision.sentence,
        }
    return attributes


def _frozen(outcome: TrialOutcome, trained: list[TrialOutcome], metric: str) -> FrozenTrial:
    """One trial: complete, pruned if it was stopped early or truncated, failed without a result."""
    from optuna.trial import TrialState, create_trial

    arm = outcome.arm
    attributes: dict[str, Any] = {
        "trial_id": outcome.trial_id,
        "lora_alpha": arm.lora_alpha,
        "stage": arm.stage() or "whole",
    }
    points: Mapping[int, float] = {}
    state, value = TrialState.FAIL, None
    if isinstance(outcome, TrialFinished):
        whole = arm.is_direct and metric in outcome.metrics
        state = TrialState.COMPLETE if whole else TrialState.PRUNED
        value = outcome.metrics[metric] if whole else None
        points = {point.step: point.value for point in outcome.points}
        attributes |= {"metrics": outcome.metrics, "train_seconds": outcome.train_seconds}
    else:
        attributes["reason"] = outcome.reason
        if isinstance(outcome, TrialCollapsed):
            points = {point.step: point.value for point in outcome.points}
    return create_trial(
        state=state,
        value=value,
        params={"rank": arm.rank, "learning_rate": arm.learning_rate, "seed": arm.seed},
        distributions=_distributions(trained),
        user_attrs=attributes,
        intermediate_values=dict(points),
    )


def _distributions(trained: list[TrialOutcome]) -> dict[str, Any]:
    from optuna.distributions import FloatDistribution, IntDistribution

    ranks = [outcome.rank for outcome in trained]
    learning_rates = [outcome.learning_rate for outcome in trained]
    seeds = [outcome.seed for outcome in trained]
    return {
        "rank": IntDistribution(min(ranks), max(ranks), log=True),
        "learning_rate": FloatDistribution(min(learning_rates), max(learning_rates), log=min(learning_rates) > 0),
        "seed": IntDistribution(0, max(seeds)),
    }


TARGETS: dict[str, Callable[[Recipe], Written]] = {
    "peft": peft,
    "trl": trl,
    "axolotl": axolotl,
    "llamafactory": llamafactory,
    "unsloth": unsloth,
    "ms-swift": ms_swift,
    "vllm": vllm,
    "sglang": sglang,
    "llama.cpp": llama_cpp,
    "ollama": ollama,
    "diffusers": diffusers,
    "kohya": kohya,
}
SERVERS = ("vllm", "sglang", "llama.cpp", "ollama")  # they load the adapter itself, which --pad can pad
PADDED_FOLDER = "adapter"


@dataclass(frozen=True, slots=True)
class Exported:
    """The written files, the command that uses them from inside the folder, and what the target cannot express."""

    target: str
    folder: Path
    files: list[str]
    command: str
    notes: list[str]
    hub: str | None = None  # address of the repository, if the adapter was pushed

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"folder": str(self.folder)}


def require_target(name: str) -> None:
    """Refuse an unknown target.

    Raises:
        SettingsError: lists the targets.
    """
    if name not in TARGETS:
        raise SettingsError(
            f"export target {name!r} is not known{did_you_mean(name, [*TARGETS, 'optuna'])}; allowed: {', '.join(TARGETS)}, optuna"
        )


def require_paddable(name: str) -> None:
    """Refuse to pad for a target that is not a server.

    Raises:
        SettingsError: lists the servers.
    """
    if name not in SERVERS:
        raise SettingsError(f"--pad goes with a server ({', '.join(SERVERS)}), not with --to {name}")


def write_export(name: str, recipe: Recipe, folder: Path, pad: bool = False) -> Exported:
    """Write a target's files into `folder`, which is replaced.

    Args:
        pad: write a copy of the adapter with one rank and one scale for a server: vLLM's next `--max-lora-rank`, or
            the highest rank of any module.

    Raises:
        SettingsError: an unknown target, or padding for a target that is not a server.
        ResultsError: a rank that the server does not serve.
        ModelError: an adapter that can't be padded.
    """
    require_target(name)
    if name != "peft":  # its folder may be published, and needs neither the model nor the data
        recipe = recipe.located()
    exported = recipe
    if pad:
        require_paddable(name)
        rank = served_rank(recipe.highest_rank) if name == "vllm" else recipe.highest_rank
        exported = recipe.padded_to(rank, folder / PADDED_FOLDER)
    uses_adapter = name in (*SERVERS, "peft")
    written = TARGETS[name](exported if uses_adapter else exported.training())
    comments = recipe.comments()
    with replacing_folder(folder) as temporary:
        if pad:
            from rightrank.models.padding import write_padded  # imports torch

            write_padded(recipe.adapter, temporary / PADDED_FOLDER, exported.r)
        for file, (form, part) in written.lora_files.items():
            from rightrank.models.adapter_files import write_lora_file

            write_lora_file(recipe.adapter, temporary / file, form, part)
        if written.with_adapter:
            for path in sorted(path for path in recipe.adapter.iterdir() if path.is_file()):
                shutil.copy2(path, temporary / path.name)
        for file, text in written.files.items():
            (temporary / file).write_text(_commented(file, text, comments), encoding="utf-8")
    files = sorted(path.name for path in folder.iterdir())
    return Exported(name, folder, files, written.command, [*written.notes, *comments])


def _commented(file: str, text: str, comments: Sequence[str]) -> str:
    """The text of a file with comments at its start, below the interpreter's line; JSON has none."""
    if file.endswith(".json") or not comments:
        return text
    lines = "".join(f"# {' '.join(comment.splitlines())}\n" for comment in comments)  # a name may hold a line's end
    first, newline, rest = text.partition("\n")
    return f"{first}{newline}{lines}{rest}" if first.startswith("#!") else lines + text
