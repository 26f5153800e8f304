"""What `doctor` found, on one screen."""

from __future__ import annotations

from rightrank.records.doctor import Doctor
from rightrank.report.format import size, visible


def doctor_text(found: Doctor) -> str:
    """One screen of plain lines."""
    versions = [f"{name} {number or 'missing'}" for name, number in found.versions.items()]
    memory = "" if found.device_memory_bytes is None else f", {size(found.device_memory_bytes)}"
    known = "unknown" if found.memory_bytes is None else size(found.memory_bytes)
    free = "" if found.available_bytes is None else f", {size(found.available_bytes)} available"
    lines = [
        f"versions  {', '.join(versions[:5])}",
        f"          {', '.join(versions[5:])}",
        f"system    {found.system}, {found.cores} cores",
        f"device    {found.device}{memory}",
        f"memory    {known}{free}",
        "places",
    ]
    for place in found.places:
        room = "unreachable" if place.free_bytes is None else f"{size(place.free_bytes)} free"
        lines.append(
            f"  {place.purpose:34s}{'writable' if place.writable else 'NOT WRITABLE'}, {room}: {visible(place.path)}"
        )
    there = [one.extra for one in found.extras if one.installed]
    missing = [one.extra for one in found.extras if not one.installed]
    lines.append(f"extras    installed: {', '.join(there) or 'none'}")
    if missing:
        lines.append(f"          not installed: {', '.join(missing)} (pip install 'rightrank[NAME]')")
    lines += [f"problem   {visible(problem)}" for problem in found.problems]
    return "\n".join([*lines] if found.problems else [*lines, "no problem found"])
