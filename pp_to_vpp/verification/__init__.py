"""Proof that a target holds what its source holds; knows nothing of plans."""
