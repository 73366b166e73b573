"""Named models and architectures, as data: each module of this package holds all that is specific to one family.

A new family is a new module with a `FAMILY`; modules are discovered, there is no list of them. A leading underscore marks shared parts.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import re
from typing import Any

from litgpt.families._architecture import Architecture, Fields, Hf, Table as Table
from litgpt.families._family import Family
from litgpt.families._gguf import Gguf
from litgpt.families._pretokenizers import OTHERS, Cut as Cut
from litgpt.families._styles import OTHERS as OTHER_STYLES, Style

_NAMES = sorted(
    (module.name for module in pkgutil.iter_modules(__path__) if module.name[0] != "_"), key=lambda name: (name != "llama", name)
)
FAMILIES: dict[str, Family] = {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in _NAMES}
# By model_type. Of several architectures that express a model the first is taken: of the best-known families, then in alphabetical order.
_FIRST = dict.fromkeys(("llama", "mistral", "qwen", "phi", *_NAMES))
HF: dict[str, Architecture] = {kind: row for name in _FIRST for kind, row in FAMILIES[name].hf.items()}
GGUF: dict[str, Gguf] = {name: row for family in FAMILIES.values() for name, row in family.gguf.items()}  # by general.architecture
# By tokenizer.ggml.pre. Of several names for one way the first is written.
PRETOKENIZERS: dict[str, Cut] = {name: cut for family in FAMILIES.values() for name, cut in family.pretokenizers.items()} | OTHERS
STYLES: dict[str, Style] = OTHER_STYLES | {name: row for family in FAMILIES.values() for name, row in family.styles.items()}  # by class

_MODELS: dict[str, Fields] = {row["name"]: row for family in FAMILIES.values() for row in family.models}
_BY_HUB_NAME: dict[str, Fields] = {row["hf_config"]["name"]: row for row in _MODELS.values()}
_MULTIMODAL: dict[str, str] = {kind: text for family in FAMILIES.values() for kind, text in family.multimodal.items()}
REFUSED = {  # the reason why other common architectures are not supported
    "deepseek_v32": "sparse attention with an indexer",
    "gptj": "neighbouring pairs in a head of which only a part is rotated, beside biases of the MLP alone",
    "gemma3n": "embeddings for each block, and several residual streams",
    "gemma4": "embeddings for each block",
    "granitemoe": "all experts in one tensor with names of its own",
    "granitemoehybrid": "state spaces beside attention",
    "lfm2": "convolutions beside attention",
    "ministral3": "queries that are scaled by their positions",
    "mistral3": "a text model whose queries are scaled by their positions",
    "llama4": "experts in some blocks, and attention over chunks",
    "nemotron": "squared ReLU",
    "apertus": "the xIELU activation",
    "phimoe": "routing by sparse mixers",
    "qwen3_next": "linear attention",
    "qwen3_5": "linear attention",
    "minimax_m2": "norms of q and k over all heads beside a sigmoid router without groups",
    "opt": "learned positions with an offset, and ReLU",
    "gpt_bigcode": "learned positions with multi-query attention",
    "mamba": "state spaces instead of attention",
    "mamba2": "state spaces instead of attention",
}


def names() -> list[str]:
    """Return the names of all models, sorted."""
    return sorted(_MODELS)


def find(name: str) -> Fields | None:
    """Return the Config fields of a model by LitGPT's name or the hub's, with or without the organisation; None if it is unknown."""
    organisation, _, short = name.rpartition("/")
    row = _MODELS.get(short) or _BY_HUB_NAME.get(short)
    if row is None or (organisation and organisation != row["hf_config"]["org"]):
        return None
    return copy.deepcopy(row)


def home(name: str) -> Family | None:
    """Return the family of a named model."""
    return next((family for family in FAMILIES.values() if any(row["name"] == name for row in family.models)), None)


def prompt_style(model: str) -> str | None:
    """Return the name of the prompt style that a model of this name was trained with; None for base models."""
    styles = (item for family in FAMILIES.values() for item in family.prompts.items())
    return next((style for pattern, style in styles if re.search(pattern, model, re.IGNORECASE)), None)


def architectures() -> list[str]:
    """Return every `model_type` that can be read and written, sorted."""
    return sorted(HF)


def architecture(model_type: object) -> Architecture | None:
    """Return the architecture of a `model_type` (for a multimodal model its text model's); None if it is unknown."""
    kind = str(model_type)
    return HF.get(_MULTIMODAL.get(kind, kind))


def quantisation(hf: Hf) -> object:
    """Return the method by which the weights of a config.json are quantised, or None."""
    quantised = hf.get("quantization_config") or None
    return quantised.get("quant_method") if isinstance(quantised, dict) else quantised


def from_hf(hf: Hf) -> dict[str, Any]:
    """Return the Config fields of a Hugging Face config.json (for a multimodal model its text model's).

    Raise ValueError that lists everything that the file lacks or that cannot be built.
    """
    name, kind = hf.get("_name_or_path"), hf.get("model_type")
    if str(kind) in _MULTIMODAL and isinstance(hf.get("text_config"), dict):
        hf = {"model_type": _MULTIMODAL[str(kind)], **hf["text_config"]}
        kind = hf["model_type"]
    if not isinstance(kind, str) or kind not in HF:
        reason = f" ({REFUSED[str(kind)]})" if str(kind) in REFUSED else ""
        raise ValueError(f"model_type {kind!r} is not supported{reason}; supported are {', '.join(architectures())}")
    if quantisation(hf) == "mxfp4":  # its weights are dequantised, see `litgpt.convert.experts`
        hf = {**hf, "quantization_config": None}
    fields = HF[kind].read(hf)
    organisation, _, short = str(name or kind).rpartition("/")
    return {"name": short, "hf_config": {"org": organisation, "name": short}, **fields}
