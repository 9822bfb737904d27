"""Rewrite a Megatron-LM checkpoint from one pipeline layout into another, bit for bit."""

__version__ = "0.1.0"
