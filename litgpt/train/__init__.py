"""Training: a run from its settings to its final folder."""
