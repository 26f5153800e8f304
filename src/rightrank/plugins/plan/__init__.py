"""What fits and what it costs, before any weight is loaded.

skeleton (the model without weights) → step, trace and kernels (what the real step allocates on the device) → stack (the
whole depth from a few blocks) → estimate (every rank from two traces) → simulate and allocator (the peak) → planner
(the plan) and selection_plan (the plan of a `select`).
"""

from __future__ import annotations
