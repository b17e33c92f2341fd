"""Outer LoRA adapters in PEFT's layout."""
