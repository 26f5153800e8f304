"""Verbs on a run folder, and the look at this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rightrank.runs.machine import Doctor

if TYPE_CHECKING:
    from rightrank.interop.exports import Exported
    from rightrank.report.status import RunStatus
    from rightrank.runs.journal import Repaired


def write_report(run: str | Path) -> Path:
    """Write `report.html` and the figures of a run again, from its journal alone.

    Raises:
        RunFolderError: no run there.
    """
    from rightrank.api import run_folder as runs

    return runs.write_report(run)


def write_side_by_side(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page to the file `out` that shows several runs beside each other, and the settings that differ.

    Raises:
        RunFolderError: no run in one of the folders.
    """
    from rightrank.api import run_folder as verbs

    return verbs.write_side_by_side(runs, out)


def export(
    run: str | Path, to: str, out: str | Path | None = None, *, pad: bool = False, push_to_hub: str | None = None
) -> Exported:
    """Write what another program needs to train or serve the run's adapter.

    Args:
        run: a run folder whose selection has ended.
        to: peft, trl, axolotl, llamafactory, unsloth, ms-swift, vllm, sglang, llama.cpp, ollama, diffusers or kohya; or optuna, which
            gives a study of the trials, of an unfinished run too.
        out: the folder to write, which must not exist; None for `exports/<to>` in the run folder, replaced whole.
        pad: for a server: also write the adapter at one rank that it serves and one scale, the same function.
        push_to_hub: with `to="peft"`, `owner/name` of a repository to upload the adapter, its card and its plot to.

    Raises:
        SettingsError: an unknown target.
        RunFolderError: no run there, one without a decision or an adapter, or `out` exists.
        ResultsError: a rank that the server does not serve.
        ModelError: an adapter that can't be padded.
        RunError: the hub could not be reached or refused; the files are written all the same.
    """
    from rightrank.api import run_folder as runs

    return runs.export(run, to, out, pad=pad, push_to_hub=push_to_hub)


def repair(run: str | Path) -> Repaired:
    """Keep the whole records of a damaged journal and set the damaged lines aside in a file of their own.

    Raises:
        RunFolderError: no run there, a process at work in it, or a run whose start is damaged.
    """
    from rightrank.api import run_folder as runs

    return runs.repair(run)


def status(run: str | Path) -> RunStatus:
    """Report where a run stands, from its files; nothing in the folder is written.

    Raises:
        RunFolderError: no run there.
    """
    from rightrank.api import run_folder as runs

    return runs.status(run)


def doctor() -> Doctor:
    """Look at this machine: versions, device, memory, disk, extras and writable places."""
    from rightrank.runs.machine import examine

    return examine()
