"""Data modules: where training samples come from. Importing this loads no heavy library."""

from litgpt.data.alpaca import Alpaca as Alpaca, Alpaca2k as Alpaca2k, AlpacaGPT4 as AlpacaGPT4, Dolly as Dolly
from litgpt.data.base import DataModule as DataModule, Splits as Splits, __getattr__ as __getattr__
from litgpt.data.instructions import FLAN as FLAN, LIMA as LIMA, Deita as Deita, LongForm as LongForm
from litgpt.data.json_data import JSON as JSON
from litgpt.data.lit_data import LitData as LitData, MicroLlama as MicroLlama, TinyLlama as TinyLlama
from litgpt.data.python_docs import PythonDocs as PythonDocs
from litgpt.data.text_files import OpenWebText as OpenWebText, TextFiles as TextFiles, TinyStories as TinyStories
from litgpt.sample import Sample as Sample
