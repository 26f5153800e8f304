"""The error bound of a peak, by its source: the largest measured error, rounded up.

`benchmarks/plan/` holds the measurements: against torch's profiler on a CPU (`cpu.py`), and against published peaks
(`published.py`). The project has not measured a GPU: the bounds for CUDA are assumed, and their `basis` says so.
"""

from __future__ import annotations

from rightrank.planning.kernels import DeviceKind
from rightrank.records.plan import Error, Source
from rightrank.settings import PlanSettings

TRACED_ON_CPU = Error(
    share=0.01, basis="0.06% at worst in 76 cases against torch's profiler, several adapters per pass among them"
)
TRACED_ON_CUDA = Error(
    share=0.05, basis="assumed: not measured on a GPU; 1.4% at worst against three published peaks, not a blind test"
)
QUANTISED_ON_CUDA = Error(share=0.1, basis="assumed: the workspace inside bitsandbytes' kernels is by rule")
SHARDED = Error(share=0.1, basis="by rule; 0.5% at worst against two processes on a CPU, one small model")
MEASURED = Error(share=0.02, basis="steps of four groups of blocks on this device, extrapolated to the whole depth")
FORMULA = Error(share=1.15, basis="by rule; −53% to +40% in 76 traced cases that were measured on a CPU")
EXACT = Error(share=0.0, basis="counted")


def errors_of(settings: PlanSettings, source: Source) -> dict[str, Error]:
    """Error bounds by source, for a plan whose peak has `source`."""
    return {"exact": EXACT, source: peak_error(settings, source)}


def peak_error(settings: PlanSettings, source: Source) -> Error:
    """The error bound of the peak: the largest of those it rests on."""
    bases = [_of_source(source, settings.device)]
    if source != "formula" and settings.device == "cuda" and (settings.load_in_4bit or settings.load_in_8bit):
        bases.append(QUANTISED_ON_CUDA)
    if settings.sharding != "none":
        bases.append(SHARDED)
    return max(bases, key=lambda error: error.share)


def _of_source(source: Source, device: DeviceKind) -> Error:
    if source == "formula":
        return FORMULA
    if source == "measured":
        return MEASURED
    return TRACED_ON_CPU if device == "cpu" else TRACED_ON_CUDA
