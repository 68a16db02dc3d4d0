"""Instruction fine-tuning for IDEFICS vision-language models."""
