"""Writes the export of a run: a target's files, an Optuna study of the trials, or a repository of the hub."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rightrank.data.files import hub_errors, replacing_folder
from rightrank.decision.run import Records
from rightrank.interop.recipe import Recipe
from rightrank.interop.targets import SERVERS, TARGETS
from rightrank.models.ranks import served_rank
from rightrank.runs import plugins
from rightrank.schema.decision import Decision
from rightrank.schema.errors import MissingExtraError, ResultsError, RunError, SettingsError, did_you_mean, first_line
from rightrank.schema.scaling import rate_warning
from rightrank.schema.trials import TrialCollapsed, TrialFinished, TrialOutcome

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

STUDY = "optuna"
STUDY_FILE = "study.db"
PADDED_FOLDER = "adapter"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


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


def require_export(name: str, pad: bool, repository: str | None) -> None:
    """Refuse what no export can do, before anything is read.

    Raises:
        SettingsError: an unknown target, padding for one that is no server, or a repository for one that is not PEFT.
    """
    if name == STUDY and (pad or repository is not None):
        raise SettingsError(f"--pad and --push-to-hub are for an adapter; {STUDY!r} is a study of the trials")
    known = [*TARGETS, *plugins.exports(), STUDY]
    if name not in known:
        raise SettingsError(
            f"export target {name!r} is not known{did_you_mean(name, known)}; allowed: {', '.join(known)}"
        )
    if pad and name not in SERVERS:
        raise SettingsError(f"--pad goes with a server ({', '.join(SERVERS)}), not with --to {name}")
    if repository is not None and not REPOSITORY.fullmatch(repository):
        raise SettingsError(f"--push-to-hub {repository!r}: give a repository as owner/name")
    if repository is not None and name != "peft":
        raise SettingsError(f"--push-to-hub goes with --to peft, not with {name!r}: the hub holds the adapter itself")


def write_export(name: str, recipe: Recipe, folder: Path, pad: bool = False) -> Exported:
    """Write a target's files into `folder`, which is replaced.

    Args:
        pad: write a copy of the adapter with one rank and one scale for a server: vLLM's next `--max-lora-rank`, or
            the highest rank of any module.

    Raises:
        ResultsError: a rank that the server does not serve.
        ModelError: an adapter that can't be padded.
    """
    if name != "peft":  # its folder may be published, and needs neither the model nor the data
        recipe = recipe.located()
    exported = recipe if name in (*SERVERS, "peft") else recipe.training()
    if pad:
        rank = served_rank(recipe.highest_rank) if name == "vllm" else recipe.highest_rank
        exported = recipe.padded_to(rank, folder / PADDED_FOLDER)
    written, comments = (TARGETS | plugins.exports())[name](exported), recipe.comments()
    with replacing_folder(folder) as temporary:
        if pad:
            from rightrank.models.adapter_files import write_padded

            write_padded(recipe.adapter, temporary / PADDED_FOLDER, exported.r)
        if written.with_adapter:
            for path in sorted(path for path in recipe.adapter.iterdir() if path.is_file()):
                shutil.copy2(path, temporary / path.name)
        for file, text in written.files.items():
            (temporary / file).write_text(_commented(file, text, comments), encoding="utf-8")
    files = sorted(path.name for path in folder.iterdir())
    warnings = filter(None, [rate_warning(exported.r, exported.lora_alpha, exported.learning_rate)])
    return Exported(name, folder, files, written.command, [*written.notes, *comments, *warnings])


def _commented(file: str, text: str, comments: Sequence[str]) -> str:
    """The text of a file with comments at its start, below the interpreter's line; JSON has none."""
    if file.endswith(".json") or not comments:
        return text
    lines = "".join(f"# {' '.join(comment.splitlines())}\n" for comment in comments)  # a name may hold a line's end
    first, newline, rest = text.partition("\n")
    return f"{first}{newline}{lines}{rest}" if first.startswith("#!") else lines + text


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload `folder` (adapter, card, rank curve) to a private repository in one commit; return its address.

    Raises:
        RunError: offline, not logged in, or refused by the hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="LoRA adapter chosen by rightrank")
    except OfflineModeIsEnabled:
        raise RunError(
            f"{repository}: offline mode is on (HF_HUB_OFFLINE), so nothing was pushed; the files are in {folder}"
        ) from None
    except hub_errors() as error:
        raise RunError(f"{repository}: could not push ({first_line(error)}); the files are in {folder}") from None
    return str(address)


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
        storage = optuna.storages.RDBStorage(f"sqlite:///{temporary.resolve() / STUDY_FILE}")
        study = optuna.create_study(
            storage=storage,
            study_name="rightrank",
            direction="maximize" if records.started.higher_is_better else "minimize",
        )
        for name, value in _study_attributes(records, decision).items():
            study.set_user_attr(name, value)
        distributions = _distributions(trained)
        study.add_trials([_frozen(outcome, distributions, records.started.metric) for outcome in trained])
        storage.remove_session()  # the file is moved next
        storage.engine.dispose()
    optuna.logging.set_verbosity(before)
    notes = ["trainings that were stopped early and truncated adapters have the state pruned"]
    return Exported(STUDY, folder, [STUDY_FILE], f"optuna-dashboard sqlite:///{STUDY_FILE}", notes)


def _study_attributes(records: Records, decision: Decision | None) -> dict[str, Any]:
    settings = records.started.settings
    attributes: dict[str, Any] = {
        "metric": records.started.metric,
        "model": settings.get("model"),
        "data": settings.get("data"),
    }
    base = next((trial for trial in records.finished() if trial.rank == 0), None)
    if base is not None:
        attributes["base"] = base.metrics
    if decision is not None:
        attributes |= {name: getattr(decision, name) for name in ("rank", "verdict", "margin")}
        attributes["answer"] = decision.sentence
    return attributes


def _frozen(outcome: TrialOutcome, distributions: dict[str, Any], metric: str) -> FrozenTrial:
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
    if isinstance(outcome, TrialFinished | TrialCollapsed):
        points = {point.step: point.value for point in outcome.points}
    if isinstance(outcome, TrialFinished):
        whole = arm.is_direct and metric in outcome.metrics
        state = TrialState.COMPLETE if whole else TrialState.PRUNED
        value = outcome.metrics[metric] if whole else None
        attributes |= {"metrics": outcome.metrics, "train_seconds": outcome.train_seconds}
    else:
        attributes["reason"] = outcome.reason
    return create_trial(
        state=state,
        value=value,
        params={"rank": arm.rank, "learning_rate": arm.learning_rate, "seed": arm.seed},
        distributions=distributions,
        user_attrs=attributes,
        intermediate_values=dict(points),
    )


def _distributions(trained: list[TrialOutcome]) -> dict[str, Any]:
    from optuna.distributions import FloatDistribution, IntDistribution

    ranks = [outcome.rank for outcome in trained]
    learning_rates = [outcome.learning_rate for outcome in trained]
    return {
        "rank": IntDistribution(min(ranks), max(ranks), log=True),
        "learning_rate": FloatDistribution(min(learning_rates), max(learning_rates), log=min(learning_rates) > 0),
        "seed": IntDistribution(0, max(outcome.seed for outcome in trained)),
    }
