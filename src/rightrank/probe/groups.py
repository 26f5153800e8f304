"""Groups of modules for `allocate`: all modules of a group get one rank.

A group is named `attention=q_proj+k_proj+v_proj+o_proj`: a module belongs to it if a part of its name is one of these, so that
`vision=vision_tower` and `experts=experts` name whole parts of a model. Modules in no group form the group `rest`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rightrank.errors import SettingsError
from rightrank.io.adapter_folder import AdapterFolder

REST = "rest"


def groups_of(entries: Sequence[str], adapter: AdapterFolder) -> dict[str, str]:
    """The group of each module, by their names.

    Raises:
        SettingsError: an entry that is not NAME=PART+PART, a part that no module has, or a module in two groups.
    """
    found: dict[str, str] = {}
    for entry in entries:
        group, equals, parts = entry.partition("=")
        if not (group and equals and parts):
            raise SettingsError(f"--groups {entry!r}: give NAME=PART+PART, such as attention=q_proj+v_proj")
        for part in parts.split("+"):
            members = [module.name for module in adapter.modules if part in module.name.split(".")]
            if not members:
                raise SettingsError(f"--groups {entry!r}: no module of the adapter has {part!r} in its name")
            for name in members:
                if found.setdefault(name, group) != group:
                    raise SettingsError(f"--groups: {name} is in {found[name]} and in {group}; name each module once")
    return {module.name: found.get(module.name, REST) for module in adapter.modules}


def one_rank_a_group(ranks: Mapping[str, int], groups: Mapping[str, str], adapter: AdapterFolder) -> dict[str, int]:
    """`ranks` with one rank for each group: the mean by parameters, rounded down, so that it has no more of them."""
    spent: dict[str, int] = {}
    costs: dict[str, int] = {}
    limits: dict[str, int] = {}
    for module in adapter.modules:
        group, cost = groups[module.name], module.rows + module.columns
        spent[group] = spent.get(group, 0) + ranks[module.name] * cost
        costs[group] = costs.get(group, 0) + cost
        limits[group] = min(limits.get(group, module.rows), module.rows, module.columns)
    common = {group: min(limits[group], max(1, spent[group] // costs[group])) for group in costs}
    return {name: common[group] for name, group in groups.items()}


def ranks_by_group(ranks: Mapping[str, int], groups: Mapping[str, str]) -> dict[str, int]:
    return {group: ranks[name] for name, group in groups.items()}
