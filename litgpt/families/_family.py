"""All that is specific to a family of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from litgpt.families._architecture import Architecture, Fields
from litgpt.families._gguf import Gguf
from litgpt.families._pretokenizers import Cut
from litgpt.families._styles import Style


@dataclass(frozen=True)
class Family:
    """The FAMILY of a module in this package."""

    models: Sequence[Fields]  # the named models, see `_rows.expand`
    hf: Mapping[str, Architecture]  # by `model_type` of config.json
    gguf: Mapping[str, Gguf] = field(default_factory=dict)  # by `general.architecture`
    prompts: Mapping[str, str] = field(default_factory=dict)  # pattern of a model's name -> its prompt style; the first match counts
    styles: Mapping[str, Style] = field(default_factory=dict)  # by class name; the forms and pieces are those of `litgpt.prompts`
    pretokenizers: Mapping[str, Cut] = field(default_factory=dict)  # by `tokenizer.ggml.pre`
    multimodal: Mapping[str, str] = field(default_factory=dict)  # model_type of models with images -> that of their text model
