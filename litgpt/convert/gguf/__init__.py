"""GGUF, the file format of llama.cpp: read and written."""
