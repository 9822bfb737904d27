"""The conversion, judged by every Megatron-Core version that installs."""
