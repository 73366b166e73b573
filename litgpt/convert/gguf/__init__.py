"""GGUF, the file format of llama.cpp: read and written."""

import re
from pathlib import Path

SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)  # the name of a part


def stem(path: Path) -> str:
    """Return the name of a file without its ending and the number of a part."""
    match = SPLIT.fullmatch(path.name)
    return match[1] if match else path.stem
