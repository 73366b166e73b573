"""Checkpoints of other formats into LitGPT's: Hugging Face folders (`hf`), GGUF files (`gguf`), and the command (`to_litgpt`)."""
