"""`inspect --gradient MODEL DATA`: the spectrum of the gradient of the loss with respect to each weight, untrained."""

from __future__ import annotations

import tempfile
from pathlib import Path

from rightrank.probe.adapter_runtime import DataUse, make_runtime
from rightrank.probe.checkpoint_spectra import matrix_update
from rightrank.probe.importance import GRADIENT_EXAMPLES, weight_gradients
from rightrank.probe.spectrum import InspectionInfo, describe, flag_dead, summarise
from rightrank.records.probe import Inspection
from rightrank.settings import SelectSettings


def inspect_gradient(model: str, data: Path, settings: SelectSettings, sketch_rank: int) -> Inspection:
    """The spectra of the gradient of the mean training loss over the first examples, of the settings' target modules.

    Raises:
        InputError: the model, the data or a module name cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="rightrank-") as name:
        runtime = make_runtime(model, None, DataUse(data, settings, Path(name)))
        shapes = {target.name: target for target in runtime.targets.modules}
        gradients = weight_gradients(runtime, list(shapes))
    updates = []
    for module, gradient in gradients.items():
        target = shapes[module]
        # Conv1D stores its weight as in × out
        matrix = gradient if gradient.shape[0] == target.out_features else gradient.T
        updates.append(matrix_update(module, matrix.float(), sketch_rank))
    modules = flag_dead([describe(update) for update in updates])
    note = f"mean loss over the first {min(GRADIENT_EXAMPLES, len(runtime.examples('train')))} training examples, base without adapter"
    about = InspectionInfo("gradient", "none", model, sum(update.parameters for update in updates), notes=(note,))
    return Inspection(modules=modules, summary=summarise(modules, about))
