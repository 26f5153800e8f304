"""A judge that knows the expected answers: the answer that shares more words with it wins, equal shares are a tie.

rightrank judge RUN --command "python -m benchmarks.judged.oracle DATA.jsonl {file}" --judge oracle
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rightrank.train.scores import token_f1


def main() -> None:
    data, pairs = (Path(argument) for argument in sys.argv[1:3])
    rows = (json.loads(line) for line in data.read_text(encoding="utf-8").splitlines())
    expected = {row["prompt"]: row["completion"] for row in rows}
    for line in pairs.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        a, b = (token_f1(expected[pair["prompt"]], pair[side]) for side in ("a", "b"))
        print(json.dumps({"id": pair["id"], "outcome": "tie" if a == b else "a" if a > b else "b"}))


if __name__ == "__main__":
    main()
