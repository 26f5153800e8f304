"""The probabilities that rightrank's decision states on a seed of a grid; this alone may follow the decision's code until the judgement."""

from __future__ import annotations

import math

from benchmarks.learning_rate.policies import SeedTable
from rightrank.decision.rule import decide_table
from rightrank.decision.table import Cell, ScoreTable
from rightrank.schema.metrics import infer_metric_kind


def state_probabilities(table: SeedTable, margin: float) -> dict[tuple[int, float], float]:
    """Return for each rank, at the learning rate that the decision names, the probability that it is enough."""
    cells = {
        (rank, rate, table.seed): Cell(
            f"{rank}-{rate:g}-{table.seed}", measured.validation_mean, measured.validation, table.weights
        )
        for (rank, rate), measured in table.trained().items()
        if measured.validation is not None and math.isfinite(measured.validation_mean)
    }
    kind = infer_metric_kind("loss", False, "token_loss" if (table.weights != 1).any() else "loss")
    decision = decide_table(ScoreTable("loss", False, cells, kind=kind), margin)
    return {
        (evidence.rank, evidence.learning_rate): evidence.probability
        for evidence in decision.ranks
        if evidence.rank > 0 and evidence.probability is not None and evidence.learning_rate is not None
    }
