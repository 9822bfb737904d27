"""Torch files as bytes and inert objects: knows no Megatron."""
