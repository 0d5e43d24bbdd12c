"""Supervised fine-tuning: the entry point is ``sft.py``."""
