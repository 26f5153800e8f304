"""The architectures of `benchmarks/plan`, small enough for a test."""

from benchmarks.plan.architectures import small_configs

CONFIGS = small_configs(64, 4, 512, 256, blocks=3)
