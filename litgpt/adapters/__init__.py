"""Adapters: their settings, the base class, the blocks that get them, and variants of LoRA."""
