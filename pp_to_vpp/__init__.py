"""Rewrite a Megatron-LM pipeline-parallel checkpoint into its virtual-pipeline form, bit for bit."""

__version__ = "0.1.0"
