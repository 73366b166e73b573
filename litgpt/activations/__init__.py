"""Activations of the frozen prefix: recomputed, cached, and used to choose blocks."""
