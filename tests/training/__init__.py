"""Megatron-Core from PyPI on a CPU: the judge of converted checkpoints."""
