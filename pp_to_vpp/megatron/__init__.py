"""Megatron's rules: what its files look like, by version (see FORMAT.md beside this file)."""
