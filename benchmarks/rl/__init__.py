"""Reinforcement learning: a live grid of GRPO trainings on a CPU, and replays of the profile `rl`."""
