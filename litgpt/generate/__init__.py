"""Answers from a model: `engine` draws tokens, `base` and `chat` are the commands."""
