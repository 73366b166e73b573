"""LitGPT-compatible fine-tuning with Skip2-LoRA built in. Names load on first use, so that `import litgpt` does not load torch."""

import importlib
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from litgpt.api import LLM as LLM
    from litgpt.config import Config as Config
    from litgpt.model import GPT as GPT
    from litgpt.prompts import PromptStyle as PromptStyle
    from litgpt.tokenizer import Tokenizer as Tokenizer

__version__ = "0.6.0+skip2lora"


def _is_idle() -> bool:
    """Return True if this is the only running process in any of ten samples of Linux's /proc/stat: others start and end all the time."""
    for _ in range(10):
        try:
            with open("/proc/stat") as file:
                if "procs_running 1\n" in file:
                    return True
        except OSError:
            return False
        time.sleep(0.002)
    return False


# Between parallel regions OpenMP's threads spin for milliseconds by default, on a core that another program may need; threads that sleep
# wake up late. A step of 0.28 s on two idle cores took 0.4 to 0.6 s with the shorter spin, as on a single core. With one core busy it took
# 0.5 s instead of 1.2 s, and 2.8 s with a spin three times as long. The variable is read when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000" if _is_idle() else "1000")

# oneDNN keeps the code of the last 1,024 products that it compiled, one for each shape, and batches of text take ever new shapes. In 120
# steps of LoRA on a model of 135M parameters that was 0.4 of 1.9 GiB. A step has fewer than 64 shapes, so it is as fast with 128.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

importlib.import_module("litgpt.aliases")

_HOME = {
    "GPT": "litgpt.model",
    "Config": "litgpt.config",
    "LLM": "litgpt.api",
    "PromptStyle": "litgpt.prompts",
    "Tokenizer": "litgpt.tokenizer",
}
_MODULES = ("adapter", "adapter_v2", "api", "config", "data", "lora", "model", "prompts", "tokenizer", "utils")

__all__ = ["GPT", "LLM", "Config", "PromptStyle", "Tokenizer", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"litgpt.{name}")
    raise AttributeError(f"module 'litgpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
