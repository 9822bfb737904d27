"""Processes, and the target's folders."""
