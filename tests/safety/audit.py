"""What `pip-audit --format json` found, in one line: packages that were not looked up are no packages without a fault.

pip-audit --format json … | python tests/safety/audit.py
"""

from __future__ import annotations

import json
import sys
from typing import Any

OURS = "rightrank"  # installed from here, and on no index


def summary(report: dict[str, Any]) -> tuple[str, int]:
    """`(line, exit status)`: 0 only where every package was looked up and none has an advisory."""
    packages = [package for package in report["dependencies"] if package["name"] != OURS]
    skipped = [package for package in packages if "skip_reason" in package]
    faulty = [package for package in packages if package.get("vulns")]
    line = f"audit: {len(packages) - len(skipped)} of {len(packages)} packages were looked up"
    if faulty:
        named = "; ".join(
            f"{one['name']} {one['version']}: {', '.join(v['id'] for v in one['vulns'])}" for one in faulty
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
    line, status = summary(json.loads(text))
    print(line)
    sys.exit(status)


if __name__ == "__main__":
    main()
