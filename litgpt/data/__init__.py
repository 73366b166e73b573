"""Data modules: where training samples come from. Importing this loads no heavy library."""

from litgpt.data.alpaca import Alpaca, Alpaca2k, AlpacaGPT4, Dolly
from litgpt.data.base import DataModule, Splits, __getattr__ as __getattr__
from litgpt.data.instructions import FLAN, LIMA, Deita, LongForm
from litgpt.data.json_data import JSON
from litgpt.data.lit_data import LitData, MicroLlama, TinyLlama
from litgpt.data.python_docs import PythonDocs
from litgpt.data.text_files import OpenWebText, TextFiles, TinyStories
from litgpt.sample import Sample

__all__ = [
    "FLAN",
    "JSON",
    "LIMA",
    "Alpaca",
    "Alpaca2k",
    "AlpacaGPT4",
    "DataModule",
    "Deita",
    "Dolly",
    "LitData",
    "LongForm",
    "MicroLlama",
    "OpenWebText",
    "PythonDocs",
    "Sample",
    "Splits",
    "TextFiles",
    "TinyLlama",
    "TinyStories",
]
