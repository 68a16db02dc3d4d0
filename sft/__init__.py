"""Instruction fine-tuning for IDEFICS vision-language models."""

__version__ = "0.1.0"
