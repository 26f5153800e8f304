"""What is asked of a selection and what is then loaded, and what refuses it at once, before torch is imported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rightrank.data.rows import require_rows
from rightrank.models.places import require_model
from rightrank.runs.plugins import executors
from rightrank.schema.errors import SettingsError
from rightrank.schema.settings import SelectSettings
from rightrank.schema.table import require_no_secret
from rightrank.search.strategies import make_strategy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rightrank.runs.plugins import MemoryPlan
    from rightrank.schema.events import RunStarted
    from rightrank.train.runtime import Runtime

Rows: TypeAlias = Iterable[Mapping[str, object]]  # a `datasets.Dataset` is one


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked."""

    model: str | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    data: str | Path | Rows | Mapping[str, Rows]
    settings: SelectSettings
    begun: Mapping[str, Any] | None = None  # if it resumes a run: the settings that the run began with

    @property
    def model_name(self) -> str:
        return self.model if isinstance(self.model, str) else f"in memory ({type(self.model).__name__})"

    @property
    def data_name(self) -> str:
        if not isinstance(self.data, str | Path):
            return f"in memory ({type(self.data).__name__})"
        return str(self.data).encode("utf-8", "backslashreplace").decode()  # a file's name may hold what JSON can't


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is loaded."""

    runtime: Runtime
    settings: SelectSettings  # with the settled ranks
    steps: int  # optimizer steps of every arm
    started: RunStarted
    planned: MemoryPlan | None  # None: an architecture that can't be planned

    @property
    def is_token_loss(self) -> bool:
        return self.runtime.data.summary.is_token_loss

    @property
    def unseen_steps(self) -> int:
        """Steps that the training examples last beyond those of one training; 0 if it sees every example."""
        per_step = self.settings.items_per_step
        return max(0, len(self.runtime.examples("train")) // per_step - self.steps)


def check(request: Request) -> None:
    """Refuse what can't work.

    Raises:
        SettingsError: an unknown strategy, one that can't work within its budget, or workers for what is in memory.
        DataError: a data file that is missing or of a type that is not read.
        ModelError: a model folder that is missing or holds no model, or a name that the hub does not know.
        MissingExtraError: an optimizer that is not installed.
    """
    settings = request.settings
    _require_storable(request)
    make_strategy(settings, settings.max_steps or 1)
    for source in (request.data, settings.validation or None):
        if isinstance(source, str | Path):
            require_rows(Path(source))
    if isinstance(request.model, str):
        require_model(request.model)
    if settings.executor != "local" and settings.executor not in executors():
        raise SettingsError(f"executor {settings.executor!r} needs the plug-in cluster, which is not there")
    for what, given in (("model", request.model), ("data", request.data)):
        if settings.executor != "local" and not isinstance(given, str | Path):
            raise SettingsError(
                f"executor {settings.executor!r}: the {what} is in memory, which workers can't read; "
                "give a path or a name, or executor 'local'"
            )


def _require_storable(request: Request) -> None:
    try:
        require_no_secret("model", request.model_name)
        require_no_secret("data", request.data_name)
    except ValueError as error:
        raise SettingsError(str(error)) from None
