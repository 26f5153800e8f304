"""A model of torch's CUDA caching allocator: the bytes it reserves from the device for a sequence of requests.

The rules are those of `c10/cuda/CUDACachingAllocator.cpp` at its default settings (torch 2.x):

- a request is rounded up to 512 bytes;
- a request up to 1 MiB is served from a segment of 2 MiB, one below 10 MiB from a segment of 20 MiB, and a larger one
  from its own segment, rounded up to 2 MiB;
- the smallest free block that fits is taken, and split where more than 1 MiB (512 bytes in the small pool) remains;
- a freed block merges with its free neighbours in the segment; segments are kept.

Not covered: `expandable_segments`, `max_split_size_mb`, several streams, and the release of cached segments when the
device is full, which reserves less and takes more time.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

ROUNDING = 512
SMALL_REQUEST = 2**20
SMALL_SEGMENT = 2 * 2**20
LARGE_REQUEST = 10 * 2**20
LARGE_SEGMENT = 20 * 2**20
SEGMENT_ROUNDING = 2 * 2**20


@dataclass(slots=True, eq=False)
class _Block:
    """A range of a segment, taken or free, with its neighbours."""

    address: int
    size: int
    small: bool
    taken: bool = True
    before: _Block | None = None
    after: _Block | None = None


class CachingAllocator:
    """Serves requests by name, and counts allocated and reserved bytes."""

    def __init__(self) -> None:
        self.allocated = 0  # bytes of taken blocks, rounded as torch counts them
        self.reserved = 0  # bytes of all segments
        self.peak_allocated = 0
        self.peak_reserved = 0
        self._free: tuple[list[tuple[int, int, _Block]], list[tuple[int, int, _Block]]] = ([], [])
        self._taken: dict[int, _Block] = {}
        self._next_address = 0

    def allocate(self, name: int, size: int) -> None:
        """Serve a request of `size` bytes; an empty tensor takes nothing."""
        if size <= 0:
            return
        rounded = round_request(size)
        pool = self._free[rounded <= SMALL_REQUEST]
        position = bisect_left(pool, (rounded, -1))
        block = pool.pop(position)[2] if position < len(pool) else self._new_segment(rounded)
        left = block.size - rounded
        if left and (left >= ROUNDING if block.small else left > SMALL_REQUEST):
            self._split(block, rounded, left)
        block.taken = True
        self._taken[name] = block
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self.peak_allocated = self.allocated

    def free(self, name: int) -> None:
        block = self._taken.pop(name, None)
        if block is None:
            return
        self.allocated -= block.size
        block.taken = False
        before, after = block.before, block.after
        if before is not None and not before.taken:
            block = self._merged(block, before)
        if after is not None and not after.taken:
            block = self._merged(block, after)
        insort(self._free[block.small], (block.size, block.address, block))

    def empty_cache(self) -> None:
        """Release every segment without a taken block, as `torch.cuda.empty_cache` does."""
        for pool in self._free:
            kept = [entry for entry in pool if entry[2].before is not None or entry[2].after is not None]
            self.reserved -= sum(entry[0] for entry in pool) - sum(entry[0] for entry in kept)
            pool[:] = kept

    def _new_segment(self, size: int) -> _Block:
        segment = segment_size(size)
        block = _Block(self._next_address, segment, size <= SMALL_REQUEST)
        self._next_address += segment + ROUNDING  # a gap: segments never join
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _split(self, block: _Block, size: int, left: int) -> None:
        """Keep `size` bytes of the block; the `left` bytes after them are a free block."""
        rest = _Block(block.address + size, left, block.small, False, block, block.after)
        if block.after is not None:
            block.after.before = rest
        block.after = rest
        block.size = size
        insort(self._free[block.small], (rest.size, rest.address, rest))

    def _merged(self, block: _Block, neighbour: _Block) -> _Block:
        """Merge both into one block; `neighbour` is free and leaves the pool."""
        pool = self._free[neighbour.small]
        del pool[bisect_left(pool, (neighbour.size, neighbour.address))]
        first, second = (neighbour, block) if neighbour.address < block.address else (block, neighbour)
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        first.taken = False
        return first


def round_request(size: int) -> int:
    """Bytes that a request of `size` bytes occupies."""
    return max(ROUNDING, -(-size // ROUNDING) * ROUNDING)


def segment_size(size: int) -> int:
    """Bytes of the segment reserved for a rounded request that no free block can serve."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if size < LARGE_REQUEST:
        return LARGE_SEGMENT
    return -(-size // SEGMENT_ROUNDING) * SEGMENT_ROUNDING
