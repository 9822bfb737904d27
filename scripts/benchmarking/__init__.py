"""Parts of the benchmark: made checkpoints, measured runs, tables."""
