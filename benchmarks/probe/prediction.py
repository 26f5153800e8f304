"""Does any spectral figure of a trained adapter predict the rank that held-out data decide?

    python -m benchmarks.probe.prediction [--tasks 40] [--runs RUN ...]

Planted tasks: a linear layer whose target differs from the base by an update of random rank and decay, on inputs of
uneven variance, with random noise in the labels and a random number of training examples. All ranks are trained with
the same batches; the whole grid's decision (the project's rule, at two margins) is the truth. The figures are of the
top rank's adapter. `truncation` is the rank that the same rule picks from that adapter's truncations, on the same
held-out examples. Finished run folders with their trials' adapters are added as further tasks with --runs.

Spearman's correlation with the decided rank, with a 95% interval by resampling tasks.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from tests.tiny import UNMEASURED

from benchmarks.probe.common import store
from rightrank.adapters import spectra
from rightrank.decision.rule import decision_of
from rightrank.decision.table import table_of
from rightrank.models.truncation import resized_factors
from rightrank.schema.decision import Decision
from rightrank.schema.trials import TrialFinished

RANKS = (1, 2, 4, 8, 16)
SIDE = 32
STEPS = 400
HELD_OUT = 400
SHARES = (0.01, 0.05)  # the margin, as a share of what the best rank gains over the base


def trial(rank: int, losses: Any) -> TrialFinished:
    """Example losses as the record that `decide` reads."""
    return TrialFinished(
        trial_id=f"r{rank}",
        rank=rank,
        learning_rate=0.0 if rank == 0 else 1e-2,
        lora_alpha=1.0,
        seed=0,
        steps=STEPS,
        value=float(losses.mean()),
        metrics={"loss": float(losses.mean())},
        **(UNMEASURED | {"item_losses": losses.tolist(), "item_tokens": [1] * len(losses)}),
    )


def planted_task(number: int) -> tuple[list[TrialFinished], tuple[Any, Any], Callable[[Any, Any], Any]]:
    """The grid's trials, the top adapter's (B, A), and the held-out losses of any (B, A)."""
    generator = torch.Generator().manual_seed(number)
    numpy_generator = np.random.default_rng(number)
    rank = int(numpy_generator.integers(1, 17))
    decay = float(numpy_generator.uniform(0, 1.5))
    examples = int(2 ** numpy_generator.uniform(7, 11))
    noise = float(numpy_generator.uniform(0.05, 0.5))
    u, v = (torch.linalg.qr(torch.randn(SIDE, SIDE, generator=generator)).Q[:, :rank] for _ in range(2))
    delta = u @ torch.diag(torch.arange(1, rank + 1).float() ** -decay) @ v.T
    spread = torch.arange(1, SIDE + 1).float() ** -float(numpy_generator.uniform(0, 1))
    inputs = torch.randn(examples + HELD_OUT, SIDE, generator=generator) * spread
    targets = inputs @ delta.T + noise * torch.randn(examples + HELD_OUT, SIDE, generator=generator) * spread.mean()

    def losses(b: Any, a: Any) -> Any:
        with torch.no_grad():
            error = targets[examples:] - inputs[examples:] @ (torch.as_tensor(b).float() @ torch.as_tensor(a).float()).T
            return error.square().mean(1).double().numpy()

    draw = torch.randn(max(RANKS), SIDE, generator=generator) / SIDE**0.5
    order = torch.randint(examples, (STEPS, 32), generator=generator)
    trials = [trial(0, losses(torch.zeros(SIDE, 1), torch.zeros(1, SIDE)))]
    factors: tuple[Any, Any] = (None, None)
    for r in RANKS:
        b, a = torch.zeros(SIDE, r, requires_grad=True), draw[:r].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([b, a], lr=1e-2)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / STEPS)
            batch = order[step]
            loss = (targets[batch] - inputs[batch] @ (b @ a).T).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        factors = (b.detach().double().numpy(), a.detach().double().numpy())
        trials.append(trial(r, losses(*factors)))
    return trials, factors, losses


def figures(b: Any, a: Any) -> dict[str, float]:
    s = spectra.factored_singular_values(b, a)
    return {
        "energy 0.9": spectra.energy_rank(s, 0.9) or 0,
        "energy 0.99": spectra.energy_rank(s, 0.99) or 0,
        "effective rank": spectra.effective_rank(s),
        "stable rank": spectra.stable_rank(s),
        "noise_rank": spectra.hard_threshold_rank(s, len(s), len(s)),
    }


def truncated(b: Any, a: Any, rank: int) -> tuple[Any, Any]:
    new_b, new_a = resized_factors(torch.from_numpy(b), torch.from_numpy(a), rank, 1.0)
    return new_b.numpy(), new_a.numpy()


def run_tasks(runs: list[Path]) -> list[dict[str, Any]]:
    """Finished runs: the decided rank, and the median over modules of each figure of the top rank's adapters."""
    from rightrank.api.adapters import inspect

    rows = []
    for run in runs:
        lines = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
        trials = [TrialFinished.model_validate(line) for line in lines if line["type"] == "trial_finished"]
        decision = decision_of(table_of(trials, "loss", False), lines[0]["settings"].get("margin"))
        top = max(trials, key=lambda one: (one.rank, -one.value))
        modules = inspect(run / "trials" / top.trial_id).modules
        rows.append(
            {
                "run": run.name,
                "decided": walked(decision),
                "energy 0.99": float(np.median([module.energy_rank["0.99"] for module in modules])),
                "effective rank": float(np.median([module.effective_rank for module in modules])),
                "noise_rank": float(np.median([module.noise_rank for module in modules])),
            }
        )
    return rows


def walked(decision: Decision) -> int:
    """The smallest rank that the walk down reaches at the decision's margin."""
    return [step.rank for step in decision.staircase if step.margin <= decision.margin][-1]


def interval(x: Any, y: Any) -> tuple[float, float, float]:
    """Spearman's correlation, and the 2.5% and 97.5% quantiles over resampled tasks."""
    generator = np.random.default_rng(0)
    draws = []
    for _ in range(1000):
        chosen = generator.integers(len(x), size=len(x))
        if len(set(x[chosen])) > 1 and len(set(y[chosen])) > 1:
            draws.append(spearmanr(x[chosen], y[chosen]).statistic)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(spearmanr(x, y).statistic), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=40)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for number in range(arguments.tasks):
        trials, (b, a), losses = planted_task(number)
        truncations = [trials[0], *(trial(rank, losses(*truncated(b, a, rank))) for rank in RANKS)]
        gain = trials[0].value - min(one.value for one in trials[1:])
        row: dict[str, Any] = {"task": number, **figures(b, a)}
        for share in SHARES:
            margin = max(share * gain, 1e-9)
            row[f"decided {share:g}"] = walked(decision_of(table_of(trials, "loss", False), margin))
            row[f"truncation {share:g}"] = walked(decision_of(table_of(truncations, "loss", False), margin))
        rows.append(row)
    result: dict[str, Any] = {}
    for share in SHARES:
        truth = np.array([row[f"decided {share:g}"] for row in rows])
        print(
            f"\nmargin {share:.0%} of the gain; decided ranks: {dict(zip(*np.unique(truth, return_counts=True), strict=True))}"
        )
        for figure in [*figures(*truncated(np.eye(4), np.eye(4), 2)), f"truncation {share:g}"]:
            x = np.array([row[figure] for row in rows])
            correlation, low, high = interval(x, truth)
            named = np.array([RANKS[np.searchsorted(RANKS, min(value, RANKS[-1]))] for value in x])  # rounded up
            exact, under = float(np.mean(named == truth)), float(np.mean(named < truth))
            result[f"{figure} at {share:g}"] = {
                "spearman": correlation,
                "low": low,
                "high": high,
                "exact": exact,
                "below": under,
            }
            print(
                f"{figure:<18} {correlation:+.2f} [{low:+.2f}, {high:+.2f}]  same rank {exact:.0%}, below {under:.0%}"
            )
    real = run_tasks(arguments.runs)
    for row in real:
        print(row)
    store("prediction", {"tasks": rows, "correlations": result, "runs": real})


if __name__ == "__main__":
    main()
