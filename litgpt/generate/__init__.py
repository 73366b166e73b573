"""Text generation: `engine` samples tokens, `base` and `chat` are the commands."""
