"""The trace of a deep model from a trace of a few of its blocks.

Blocks of a transformer repeat, alone or in groups (such as a sliding-window block and a full one). A trace of four
groups has everything: the first, the last, and two in the middle. Where the two middle groups have the same allocations,
each freed at the same place relative to its group, the trace of the whole depth repeats the middle:

    traced     first  middle  middle  last
    whole      first  middle  middle  middle  …  middle  last

Otherwise, or where the blocks of the full model differ, the full model is traced.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rightrank.plugins.plan.trace import StepTrace

TRACED_GROUPS = 4
MAX_PERIOD = 8  # blocks; a stack with a longer pattern is traced whole


@dataclass(frozen=True, slots=True)
class Reduction:
    """A stack of `groups` groups of `period` blocks, four groups of which are traced."""

    period: int
    groups: int


def reduced_config(config: Any, depth: int) -> Any:
    """The same model with `depth` blocks."""
    reduced = copy.deepcopy(config)
    text = reduced.get_text_config()
    full = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == full and not name.startswith("_"):
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return reduced


def find_reduction(blocks: Sequence[torch.nn.Module]) -> Reduction | None:
    """The shortest period with which the blocks repeat; None where a reduced trace saves nothing.

    The first and the last group may differ from the middle.
    """
    kinds = [signature(block) for block in blocks]
    count = len(kinds)
    for period in range(1, MAX_PERIOD + 1):
        groups = count // period
        if count % period == 0 and groups > TRACED_GROUPS:
            middle = kinds[period:-period]
            if all(kind == middle[index % period] for index, kind in enumerate(middle)):
                return Reduction(period, groups)
    return None


def same_kinds(full: Sequence[torch.nn.Module], reduced: Sequence[torch.nn.Module], period: int) -> bool:
    """Whether the reduced stack has the first, middle and last group of the full one."""
    ours, theirs = [signature(block) for block in reduced], [signature(block) for block in full]
    middle = theirs[period : 2 * period] * (TRACED_GROUPS - 2)
    return ours == theirs[:period] + middle + theirs[-period:]


def signature(block: torch.nn.Module) -> str:
    """Everything that a block's memory may depend on: modules, shapes, types, what is trained, plain attributes."""
    parts = []
    for name, module in block.named_modules():
        plain = sorted(
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, int | float | str | bool) and not key.startswith("_") and key != "layer_idx"
        )
        parts.append(f"{name}:{type(module).__name__}:{plain}")
    parts += [f"{name}:{tuple(p.shape)}:{p.dtype}:{p.requires_grad}" for name, p in block.named_parameters()]
    return "\n".join(parts)


@dataclass(frozen=True, slots=True)
class _Event:
    """A birth, or a death with the place of its birth: the segment, and the number among that segment's births."""

    birth: bool
    segment: int
    ordinal: int


def deepen(trace: StepTrace, groups: int) -> StepTrace | None:
    """The trace of `groups` groups from that of four; None where the middle groups differ, or where the ends free
    allocations of them."""
    parts = _parts(trace)
    if parts is None:
        return None
    source = [_Segment(kind, number, parts[index]) for index, (kind, number) in enumerate(_layout(TRACED_GROUPS))]
    by_place = {(segment.kind, segment.number): segment for segment in source}
    for kind in ("forward", "backward"):
        if _relative(by_place[kind, 1], source) != _relative(by_place[kind, 2], source):
            return None
    return _Writer(trace, source, groups).write()


@dataclass(frozen=True, slots=True)
class _Segment:
    kind: str  # forward, backward, or the name of a part outside the groups
    number: int  # of the group; 0 outside
    events: tuple[_Event, ...]


def _layout(groups: int) -> list[tuple[str, int]]:
    """`(kind, group)` of every segment, in order of time."""
    forward = [("forward", number) for number in range(groups)]
    backward = [("backward", number) for number in reversed(range(groups))]
    return [("before", 0), *forward, ("head", 0), ("head backward", 0), *backward]


def _parts(trace: StepTrace) -> list[tuple[_Event, ...]] | None:
    """The events of each segment; None where events are not in the order of segments."""
    births: dict[int, tuple[int, int]] = {}
    counts: dict[int, int] = {}
    parts: list[list[_Event]] = [[] for _ in _layout(TRACED_GROUPS)]
    last = 0
    for event, segment in zip(trace.events, trace.segments, strict=True):
        if segment < last:
            return None
        last = segment
        if event > 0:
            births[event] = (segment, counts.get(segment, 0))
            counts[segment] = counts.get(segment, 0) + 1
            parts[segment].append(_Event(True, *births[event]))
        else:
            parts[segment].append(_Event(False, *births[-event]))
    return [tuple(part) for part in parts]


def _relative(segment: _Segment, source: Sequence[_Segment]) -> list[tuple[bool, str, int, int]]:
    """The segment's events, with groups counted from its own."""
    found = []
    for event in segment.events:
        born = source[event.segment]
        grouped = born.kind in ("forward", "backward")
        offset = born.number - segment.number if grouped else 0
        found.append((event.birth, born.kind, offset, event.ordinal))
    return found


class _Writer:
    """Writes the deep trace, segment by segment."""

    def __init__(self, trace: StepTrace, source: Sequence[_Segment], groups: int) -> None:
        self._trace = trace
        self._source = source
        self._groups = groups
        self._layout = _layout(groups)
        self._index = {(segment.kind, segment.number): index for index, segment in enumerate(source)}
        self._births = self._numbers()
        self._out = StepTrace()
        self._made: dict[tuple[str, int, int], int] = {}

    def write(self) -> StepTrace | None:
        gradients: set[int] = set()
        for position, (kind, number) in enumerate(self._layout):
            template = self._source[self._index[kind, self._template(kind, number)]]
            for event in template.events:
                place = self._place(template, event, number)
                if place is None or (not event.birth and place not in self._made):
                    return None
                if event.birth:
                    old = self._births[event.segment, event.ordinal]
                    new = self._out.add(self._trace.sizes[old - 1], self._trace.origins[old - 1], position)
                    self._made[place] = new
                    if old - 1 in self._trace.gradients:
                        gradients.add(new - 1)
                else:
                    self._out.end(self._made[place], position)
            count = self._trace.flops.get(self._index[kind, self._template(kind, number)])
            if count is not None:
                self._out.flops[position] = count
        self._out.gradients = frozenset(gradients)
        return self._out

    def _numbers(self) -> dict[tuple[int, int], int]:
        """The allocation of each segment's nth birth."""
        births: dict[tuple[int, int], int] = {}
        counts: dict[int, int] = {}
        for event, segment in zip(self._trace.events, self._trace.segments, strict=True):
            if event > 0:
                births[segment, counts.get(segment, 0)] = event
                counts[segment] = counts.get(segment, 0) + 1
        return births

    def _template(self, kind: str, number: int) -> int:
        """The traced group that represents group `number`."""
        if kind not in ("forward", "backward") or number == 0:
            return 0
        return TRACED_GROUPS - 1 if number == self._groups - 1 else 1

    def _place(self, template: _Segment, event: _Event, number: int) -> tuple[str, int, int] | None:
        """The place in the deep trace where the event's allocation is born; None where it is not known."""
        born = self._source[event.segment]
        if born.kind not in ("forward", "backward"):
            return born.kind, 0, event.ordinal
        if template.kind in ("forward", "backward"):
            return born.kind, number + born.number - template.number, event.ordinal
        # Outside the groups only the first, the last and the second to last are known: a reference to group 1 would be
        # one to every middle group.
        ends = {0: 0, TRACED_GROUPS - 2: self._groups - 2, TRACED_GROUPS - 1: self._groups - 1}
        return None if born.number not in ends else (born.kind, ends[born.number], event.ordinal)
