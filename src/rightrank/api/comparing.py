"""Compare two adapters, and bring the adapters of one server to one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rightrank.io.adapter_place import require_adapter_folder, require_side
from rightrank.records.compare import AdapterComparison
from rightrank.records.fleet import Fleet
from rightrank.settings import SelectSettings, make_settings


def compare(
    a: str | Path,
    b: str | Path,
    *,
    model: str,
    data: str | Path | Sequence[str | Path],
    settings: SelectSettings | None = None,
) -> AdapterComparison:
    """Whether adapter `b` is no worse than adapter `a`, paired over all examples of `data`.

    Args:
        a: an adapter folder that PEFT loads, a model folder, or "base".
        b: the same.
        model: the base model of the adapters.
        data: a file or a folder, or several. A folder with given splits is read at its test split.
        settings: `margin`, `metric`, `metrics`, `seq_len` and how models are loaded; None for the defaults.

    Raises:
        InputError: a side, the model, the data or a metric can't be used.
        MetricError: a metric gave no score.
    """
    for side in (a, b):
        require_side(str(side))  # before what brings torch

    from rightrank.probe.compare import CompareRequest, compare_adapters

    files = [data] if isinstance(data, str | Path) else list(data)
    request = CompareRequest(str(a), str(b), model, [Path(file) for file in files], settings or make_settings({}))
    return compare_adapters(request)


def fleet(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    model: str,
    data: str | Path | Sequence[str | Path],
    settings: SelectSettings | None = None,
    ranks: Sequence[int] | None = None,
    pad: bool = False,
    recover_steps: int = 0,
    learning_rate: float | None = None,
    merge: Sequence[float] | None = None,
    ignore_base_name: bool = False,
    notice: Callable[[str], None] = lambda _: None,
) -> Fleet:
    """Bring several adapters of one server to the smallest rank at which none loses more than the margin.

    Args:
        adapters: two adapter folders or more, of one base.
        out: the folder to write, which must not exist: one folder for each adapter.
        model: the base.
        data: held-out rows for all adapters, or one file for each in their order.
        settings: of evaluation and margin; see `SelectSettings`.
        ranks: to measure; None for the powers of two.
        pad: write every adapter at the one rank that vLLM serves, with one scale.
        recover_steps: of training after each truncation, at `learning_rate`.
        merge: weights of the exact sum of the adapters, which is then truncated too, into `out/merged`; None for no sum.
        ignore_base_name: accept adapters that name another base, if their shapes fit.
        notice: receives each line for a person.

    Raises:
        InputError: an adapter of another base, data that can't be used, adapters without a common module; nothing was written.
        RunError: recovery diverged.
    """
    for adapter in map(Path, adapters):
        if not adapter.is_file():
            require_adapter_folder(adapter)  # before what brings torch

    from rightrank.probe.fleet import run_fleet
    from rightrank.probe.fleet_checks import FleetRequest

    files = [data] if isinstance(data, str | Path) else list(data)
    request = FleetRequest(
        [Path(adapter) for adapter in adapters],
        model,
        [Path(file) for file in files],
        Path(out),
        settings or make_settings({}),
        ranks,
        pad,
        recover_steps,
        learning_rate,
        merge,
        ignore_base_name,
        notice,
    )
    return run_fleet(request)
