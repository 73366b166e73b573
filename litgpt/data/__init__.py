"""Data modules: where training samples come from. Importing this loads no heavy library."""

from litgpt.data.alpaca import Alpaca, Alpaca2k
from litgpt.data.base import DataModule, Splits
from litgpt.data.json_data import JSON
from litgpt.data.python_docs import PythonDocs
from litgpt.sample import Sample

__all__ = ["JSON", "Alpaca", "Alpaca2k", "DataModule", "PythonDocs", "Sample", "Splits"]
