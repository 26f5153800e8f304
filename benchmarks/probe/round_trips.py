"""Resizing every kind of adapter: what reloads, and how far the reported error is from the error after reloading.

    python -m benchmarks.probe.round_trips [--gradience PATH/TO/gradience]

Each adapter of rank 8 is truncated to rank 3 by rightrank, by `gradience truncate`, and by PEFT's `convert_to_lora`, and loaded
with `PeftModel.from_pretrained`. The error is that of ΔW as PEFT itself computes it, against the adapter as it was; the
best possible is the discarded energy. `told` is the loss that the tool reports, in the same terms, where it reports one (of
gradience, from its mean energy retained). `function` is the distance of the logits from what they were, as a share of
what the adapter had changed in them: a tool that drops magnitudes, biases or whole modules shows there.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.adapters.adapters import KINDS, deltas, load_base, logits, make_adapter, make_base

from benchmarks.probe.common import store
from rightrank.api.adapters import resize
from rightrank.schema.errors import RightrankError

RANK = 3


def loaded(base: Path, adapter: Path) -> tuple[Any, list[str]]:
    """The PeftModel and the warnings of loading it."""
    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model: Any = PeftModel.from_pretrained(load_base(base), str(adapter))
    words = [str(one.message).splitlines()[0] for one in caught if "is_gradient_checkpointing" not in str(one.message)]
    return model, words


def error_between(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> float:
    missing = [name for name in old if name not in new]
    gone = math.hypot(*(float(old[name].norm()) for name in missing)) if missing else 0.0
    kept = math.hypot(*(float((new[name] - old[name]).norm()) for name in old if name in new))
    return math.hypot(gone, kept) / math.hypot(*(float(value.norm()) for value in old.values()))


def best_possible(old: dict[str, torch.Tensor]) -> float:
    """The discarded energy at this rank, by dense decompositions."""
    tails = [float(torch.linalg.svdvals(value)[RANK:].norm()) for value in old.values()]
    return math.hypot(*tails) / math.hypot(*(float(value.norm()) for value in old.values()))


def by_rightrank(_base: Path, adapter: Path, out: Path) -> float | None:
    return resize(adapter, out, rank=RANK).relative_delta_error


def by_gradience(program: str) -> Callable[[Path, Path, Path], float | None]:
    def run(_base: Path, adapter: Path, out: Path) -> float | None:
        command = [program, "truncate", "--peft-dir", str(adapter), "--out-dir", str(out), "--rank", str(RANK)]
        done = subprocess.run([*command, "--dtype", "fp32", "--json"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1][:160])
        return retained(done.stdout)

    return run


def retained(text: str) -> float | None:
    """sqrt(1 - energy retained), where the tool reports it."""
    try:
        answer = json.loads(text[text.index("{") : text.rindex("}") + 1])
    except ValueError:
        return None
    flat = json.dumps(answer)
    for key in ("energy_retained_mean", "mean_energy_retained", "energy_retained", "avg_energy_retained"):
        if f'"{key}"' in flat:
            value = find(answer, key)
            if isinstance(value, int | float):
                share = value / 100 if value > 1.0001 else value
                return math.sqrt(max(0.0, 1 - share))
    return None


def find(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        if key in value:
            return value[key]
        value = list(value.values())
    if isinstance(value, list):
        return next((found for one in value if (found := find(one, key)) is not None), None)
    return None


def by_peft(base: Path, adapter: Path, out: Path) -> float | None:
    from peft import save_as_lora

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _ = loaded(base, adapter)
        save_as_lora(str(out), model, rank=RANK)
    return None


def outcome(tool: Callable[[Path, Path, Path], float | None], base: Path, adapter: Path, out: Path) -> dict[str, Any]:
    """What a tool does with one adapter."""
    old = deltas(loaded(base, adapter)[0])
    told: float | None = None
    try:
        told = tool(base, adapter, out)
        model, words = loaded(base, out)
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, RightrankError, AttributeError) as error:
        return {"works": False, "reason": f"{type(error).__name__}: {error}".splitlines()[0][:160], "told": told}
    return {
        "works": True,
        "warnings": words,
        "error": error_between(old, deltas(model)),
        "best": best_possible(old),
        "function": function_error(base, adapter, model),
        "told": told,
    }


def function_error(base: Path, adapter: Path, model: Any) -> float:
    """The distance of the logits from what they were, over what the adapter had changed in them."""
    before, was = logits(load_base(base)), logits(loaded(base, adapter)[0].eval())
    return float((logits(model.eval()) - was).norm() / (was - before).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gradience")
    arguments = parser.parse_args()
    tools: dict[str, Callable[[Path, Path, Path], float | None]] = {"rightrank": by_rightrank, "peft": by_peft}
    if arguments.gradience:
        tools["gradience"] = by_gradience(arguments.gradience)
    rows: list[dict[str, Any]] = []
    print(f"{'kind':<16}{'tool':<12}{'best':>9}{'reloaded':>10}{'told':>9}{'function':>10}  remarks")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for kind in KINDS:
            family = kind if kind in ("conv1d", "lora_bias", "embedding") else "plain"
            base = make_base(root / f"base-{family}", family)
            adapter = make_adapter(base, root / kind, kind)
            for label, tool in tools.items():
                row = {"kind": kind, "tool": label} | outcome(tool, base, adapter, root / f"{kind}-{label}")
                rows.append(row)
                told = "–" if row["told"] is None else f"{row['told']:.4f}"
                if row["works"]:
                    remark = "; ".join(row["warnings"])[:90]
                    print(
                        f"{kind:<16}{label:<12}{row['best']:>9.4f}{row['error']:>10.4f}{told:>9}{row['function']:>10.3f}  {remark}"
                    )
                else:
                    print(f"{kind:<16}{label:<12}{'':>9}{'fails':>10}{told:>9}{'':>10}  {row['reason'][:110]}")
    store("round_trips", {"rank": RANK, "rows": rows})


if __name__ == "__main__":
    main()
