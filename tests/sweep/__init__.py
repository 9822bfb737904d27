"""Random combinations of Megatron-LM's flags, saved by real Megatron-LM work trees and converted.

``python -m tests.sweep.run`` draws them; CONTRIBUTING.md has the command.
"""
