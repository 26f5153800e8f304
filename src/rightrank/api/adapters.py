"""Inspect, resize and compare adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rightrank.adapters.adapter_files import open_adapter
from rightrank.adapters.adapter_folders import (
    CONFIG_FILE,
    require_adapter_folder,
    suggest_adapter_folder,
)
from rightrank.adapters.resize import choose_uniform_rank, require_plain_update, resize_adapter
from rightrank.adapters.spectra import inspect_adapter
from rightrank.bases.model_sources import BASE_SIDE
from rightrank.data.files import require_absent
from rightrank.schema.errors import ModelError, SettingsError
from rightrank.schema.events import EvaluationProgress, Notice
from rightrank.schema.metrics import Margin
from rightrank.schema.results import AdapterComparison, Inspection, Resized
from rightrank.schema.setting_table import get_explicit_values
from rightrank.schema.settings import SelectSettings


def inspect(adapter: str | Path) -> Inspection:
    """Compute the singular spectra of an adapter.

    Args:
        adapter: a folder of PEFT or mlx-lm, or a file of sd-scripts or diffusers.

    Raises:
        ModelError: not a readable adapter.
    """
    require_adapter_folder(Path(adapter))
    return inspect_adapter(Path(adapter))


def resize(
    adapter: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    data: str | Path | None = None,
    margin: Margin | None = None,
    train: str | Path | None = None,
    ranks: Sequence[int] | None = None,
    base: str | None = None,
    settings: SelectSettings | None = None,
    on_event: Callable[[EvaluationProgress | Notice], None] = lambda _: None,
) -> Resized:
    """Write the adapter at another rank to `out`, and report the truncation error.

    Args:
        adapter: a folder of PEFT or mlx-lm, or a file of sd-scripts or diffusers.
        out: the folder or file to write, which must not exist.
        rank: one rank for all modules; a rank above the current one pads. Give either `rank` or `data`.
        data: held-out rows; use the smallest rank whose loss on them is not worse by the margin.
        margin: with data: the accepted loss of quality, a share of the gain over the base such as "2%" or a number in the metric's
            unit; None for 1% of the gain.
        train: with data: the training data of the adapter. These rows are not scored.
        ranks: with data: the ranks to measure; None for the powers of two.
        base: with data: the base model; None for the one that the adapter names.
        settings: with data: settings for loading models and reading rows; see `SelectSettings`.
        on_event: receives the progress of each evaluation, and each line for a person.

    Raises:
        InputError: the adapter, the rule, the data or `out` can't be used; nothing was written.
    """
    require_adapter_folder(Path(adapter))
    if (rank is None) == (data is None):
        targets = "neither --rank nor --data" if rank is None else "both --rank and --data"
        raise SettingsError(f"{targets} given; give exactly one of them")
    require_absent(Path(out))
    opened = open_adapter(Path(adapter))
    require_plain_update(opened)
    if rank is not None:
        if any((margin, train, ranks, base, settings)):
            raise SettingsError(
                "margin, train, ranks, base and settings work only with data (--data FILE); leave them out"
            )
        return resize_adapter(opened, Path(out), choose_uniform_rank(opened, rank), rule=f"rank {rank}")
    from rightrank.runs.resize_by_data import resize_by_data  # imports torch and transformers

    assert data is not None
    return resize_by_data(
        opened,
        Path(out),
        data=Path(data),
        train=None if train is None else Path(train),
        base=base,
        settings=SelectSettings(**get_explicit_values(settings) | ({} if margin is None else {"margin": margin})),
        ranks=ranks,
        on_event=on_event,
    )


def compare(
    a: str | Path,
    b: str | Path,
    *,
    model: str,
    data: str | Path | Sequence[str | Path],
    settings: SelectSettings | None = None,
    base_b: str | None = None,
    on_event: Callable[[EvaluationProgress], None] = lambda _: None,
) -> AdapterComparison:
    """Test whether adapter `b` is no worse than adapter `a`, paired over all examples of `data`.

    Args:
        a: an adapter folder that PEFT loads, a model folder of transformers, a GGUF file, or "base".
        b: the same; a full model that was made from adapter `a` is `broken` if it equals the base model.
        model: the base model of the adapters.
        data: a file or a folder, or several. Of a folder with splits, the test split is read.
        base_b: how `b` is loaded: "4bit" or "8bit" (its matrices are quantised on loading), or the base of `b` if it is another one.
        settings: `margin`, `metric`, `metrics`, `seq_len` and how models are loaded; None for the defaults.
        on_event: receives the progress of each evaluation.

    Raises:
        InputError: an adapter, the model, the data or a metric can't be used.
        MetricError: a metric gave no score.
    """
    for adapter in (a, b):
        _require_comparable(str(adapter))  # before the imports that bring torch

    from rightrank.runs.compare import compare_adapters

    files = [data] if isinstance(data, str | Path) else list(data)
    paths = [Path(file) for file in files]
    return compare_adapters((str(a), str(b)), model, paths, settings or SelectSettings(), on_event, base_b)


def _require_comparable(name: str) -> None:
    folder = Path(name)
    if name == BASE_SIDE or (folder.suffix == ".gguf" and folder.is_file()):
        return
    if (folder / CONFIG_FILE).is_file():
        require_adapter_folder(folder)
    elif not (folder / "config.json").is_file():
        hint = suggest_adapter_folder(folder) or "give one, or 'base'"
        raise ModelError(
            f"{name}: this is neither an adapter folder ({CONFIG_FILE}), nor a model folder (config.json), nor a .gguf file; {hint}"
        )
