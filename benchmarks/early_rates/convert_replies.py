"""Write the stored grids of `replies` as those of kinds.py: python -m benchmarks.early_rates.convert_replies.

They are read from the commit 0cc07caf. The learning rate is the one with the lowest validation loss at the end, at rank 64.
"""

from __future__ import annotations

import io
import json
import math
import subprocess
from pathlib import Path

import numpy as np

TOP = 64


def convert(seed: int) -> None:
    source = f"0cc07caf:benchmarks/learning_rate/halving/replies_{seed}.npz"
    content = subprocess.run(["git", "show", source], capture_output=True, check=True).stdout
    with np.load(io.BytesIO(content)) as arrays:
        records, validation, tests = json.loads(str(arrays["records"])), arrays["validation"], iter(arrays["test"])
    tests_by_record = [next(tests) if record["test"] else None for record in records]
    trained = {record["rate"]: index for index, record in enumerate(records) if (record["kind"], record["rank"]) == ("trained", TOP)}  # fmt: skip
    rate = min(trained, key=lambda rate: validation[trained[rate]].mean())
    rows = {record["rank"]: index for index, record in enumerate(records) if record["kind"] == "truncated" and record["rate"] == rate}  # fmt: skip
    rows = dict(sorted((rows | {TOP: trained[rate]}).items()))
    losses = {"validation": [validation[index] for index in rows.values()], "test": [tests_by_record[index] for index in rows.values()]}  # fmt: skip
    base = round(1000 * math.log(2))
    arrays = {f"losses_{split}": np.stack([np.full_like(values[0], base), *values]) for split, values in losses.items()}
    np.savez_compressed(Path(__file__).parent / "kinds" / f"replies_{seed}.npz", ranks=np.array([0, *rows]), **arrays)


if __name__ == "__main__":
    for seed in (0, 1):
        convert(seed)
