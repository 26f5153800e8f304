"""Summarise the output of `pip-audit --format json` in one line. Packages that were not looked up do not count as safe.

pip-audit --format json … | python tests/safety/audit.py
"""

from __future__ import annotations

import json
import sys
from typing import Any

OURS = "rightrank"  # installed from here, and on no index


def summarize(report: dict[str, Any]) -> tuple[str, int]:
    """Return `(line, exit status)`. The status is 0 only if every package was looked up and none has an advisory."""
    packages = [package for package in report["dependencies"] if package["name"] != OURS]
    skipped = [package for package in packages if "skip_reason" in package]
    faulty = [package for package in packages if package.get("vulns")]
    line = f"audit: {len(packages) - len(skipped)} of {len(packages)} packages were looked up"
    if faulty:
        named = "; ".join(
            f"{entry['name']} {entry['version']}: {', '.join(v['id'] for v in entry['vulns'])}" for entry in faulty
        )
        line += f", {len(faulty)} have advisories ({named})"
    elif len(skipped) < len(packages):
        line += ", none of them has an advisory"
    if skipped:
        line += f"; {len(skipped)} were not, such as {skipped[0]['name']} ({skipped[0]['skip_reason']})"
    return line, int(bool(faulty or skipped))


def main() -> None:
    text = sys.stdin.read()
    if not text.strip():
        sys.exit("audit: pip-audit gave no answer (see above); nothing was looked up")
    line, status = summarize(json.loads(text))
    print(line)
    sys.exit(status)


if __name__ == "__main__":
    main()
