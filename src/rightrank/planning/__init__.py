"""What fits and what it costs, before any weight is loaded.

trace (the real step on meta tensors, with the device's kernels) → stack (the whole depth from a few blocks) →
estimate (every rank from two traces) → simulate with allocator (the highest point) → planner (the answer).
"""
