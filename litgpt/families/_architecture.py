"""How a Hugging Face config.json is read into `litgpt.Config` fields and written from them: one table for both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from litgpt.config import Config

Hf = Mapping[str, Any]
Fields = dict[str, Any]
REQUIRED: Any = object()
"""in place of a default: a config.json without the key is refused"""


class Key(NamedTuple):
    """The field that a key of config.json stands for."""

    field: str
    default: Any = REQUIRED
    """what transformers takes where the file lacks the key"""


class Aspect(NamedTuple):
    """Keys and fields that belong together without being equal one by one."""

    read: Callable[[Hf], Fields]
    """ValueError says what of it cannot be built"""
    write: Callable[[Config], dict[str, Any]]


@dataclass(frozen=True)
class Architecture:
    """One `model_type` of transformers."""

    class_name: str
    """what `architectures` names"""
    keys: Mapping[str, Key]
    """by key of config.json; older names of it follow, after blanks"""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """fields that every such model has"""
    accepts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """key: the values that can be built, the one that transformers takes where the file lacks the key first"""
    aspects: tuple[Aspect, ...] = ()

    def read(self, hf: Hf) -> Fields:
        """Config fields for a config.json. ValueError names every key that is missing or asks for something that cannot be built."""
        found: Fields = {}
        lacking: list[str] = []
        problems: list[str] = []
        for names, (name, default) in self.keys.items():
            key = next((key for key in names.split() if key in hf), None)
            if key is not None:
                found[name] = hf[key]
            elif default is REQUIRED:
                lacking.append(repr(names.split()[0]))
            else:
                found[name] = default
        if lacking:
            problems.append(f"lacks the key{'s' * (len(lacking) > 1)} {', '.join(lacking)}")
        for key, (default, *others) in {"quantization_config": (None, {}), **self.accepts}.items():
            if (value := hf.get(key, default)) not in (default, *others):
                supported = ", ".join(map(repr, (default, *others)))
                problems.append(f"{key} {value!r} is not supported, only {supported} {'are' if others else 'is'}")
        for aspect in self.aspects:
            try:
                found.update(aspect.read(hf))
            except KeyError as error:
                problems.append(f"lacks the key {error}")
            except ValueError as error:
                problems.append(str(error))
            except (TypeError, AttributeError, ArithmeticError) as error:
                problems.append(f"holds a value of the wrong kind: {error}")
        if problems:
            raise ValueError("; ".join(problems))
        return {**self.fixed, **found, "vocab_size": found["padded_vocab_size"]}

    def write(self, config: Config, model_type: str) -> dict[str, Any]:
        """config.json for a model of this architecture; ValueError where an aspect has no words for it.

        Token ids are null: the tokenizer knows them, and transformers' defaults would be another model's.
        """
        hf: dict[str, Any] = {"architectures": [self.class_name], "model_type": model_type}
        hf.update({names.split()[0]: getattr(config, key.field) for names, key in self.keys.items()})
        hf.update({key: values[0] for key, values in self.accepts.items()})
        for aspect in self.aspects:
            hf.update(aspect.write(config))
        return {**hf, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def sizes(**others: Key) -> dict[str, Key]:
    """The keys that nearly every architecture has by these names, and others or other defaults."""
    shared = {
        "max_position_embeddings": Key("block_size"),
        "vocab_size": Key("padded_vocab_size"),
        "num_hidden_layers": Key("n_layer"),
        "num_attention_heads": Key("n_head"),
        "hidden_size": Key("n_embd"),
        "intermediate_size": Key("intermediate_size"),
        "num_key_value_heads": Key("n_query_groups", None),
        "head_dim": Key("head_size", None),
    }
    return {**shared, **others}


def without(keys: Mapping[str, Key], *names: str) -> dict[str, Key]:
    """`keys` of an architecture that lacks some."""
    return {key: value for key, value in keys.items() if key not in names}


def activation(key: str, default: str) -> Aspect:
    """A GELU, exact or by its tanh approximation, for GptNeoxMLP."""
    names = {"gelu": "none", "gelu_python": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}

    def read(hf: Hf) -> Fields:
        value = hf.get(key, default)
        if value not in names:
            raise ValueError(f"{key} {value!r} is not supported, only {', '.join(map(repr, names))} are")
        return {"gelu_approximate": names[value]}

    return Aspect(read, lambda config: {key: "gelu" if config.gelu_approximate == "none" else "gelu_new"})


def _read_biases(hf: Hf) -> Fields:
    attention, mlp = bool(hf.get("attention_bias", False)), bool(hf.get("mlp_bias", False))
    if attention != mlp:
        raise ValueError(f"attention_bias {attention} with mlp_bias {mlp} is not supported: both or none")
    return {"bias": attention}


BIASES = Aspect(_read_biases, lambda config: {"attention_bias": config.bias, "mlp_bias": config.bias})
"""biases in all linear layers or in none"""


def window(default: int | None) -> Aspect:
    """`sliding_window`, in every block."""

    def write(config: Config) -> dict[str, Any]:
        return {"sliding_window": config.sliding_window_size if any(config.sliding_window_indices or ()) else None}

    return Aspect(lambda hf: {"sliding_window_size": hf.get("sliding_window", default)}, write)


def read_layer_types(hf: Hf, is_windowed: Callable[[int], bool]) -> list[int]:
    """1 for every block whose attention is over a window: as `layer_types` says, else by the block's number."""
    known = {"full_attention": 0, "sliding_attention": 1}
    types = hf.get("layer_types")
    if types is None:
        n_layer = hf["num_hidden_layers"]
        return [int(is_windowed(i)) for i in range(n_layer)] if isinstance(n_layer, int) else []
    if unknown := sorted({str(kind) for kind in types} - known.keys()):
        raise ValueError(f"layer_types {', '.join(unknown)} are not supported, only {', '.join(known)} are")
    return [known[kind] for kind in types]


def layer_types(config: Config) -> list[str]:
    """`layer_types` of config.json."""
    return ["sliding_attention" if windowed else "full_attention" for windowed in config.sliding_window_indices or [0] * config.n_layer]


def optional_window(is_windowed: Callable[[int, Hf], bool]) -> Aspect:
    """`use_sliding_window` switches a window on, in the blocks that `layer_types` names or, without it, `is_windowed` tells."""

    def read(hf: Hf) -> Fields:
        size = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
        blocks = read_layer_types(hf, lambda i: is_windowed(i, hf)) if size else []
        return {"sliding_window_size": size, "sliding_window_indices": blocks} if any(blocks) else {"sliding_window_size": None}

    def write(config: Config) -> dict[str, Any]:
        blocks, size = config.sliding_window_indices or [], config.sliding_window_size
        if size is None or not any(blocks):
            return {"use_sliding_window": False, "sliding_window": None}
        return {"use_sliding_window": True, "sliding_window": size, "layer_types": layer_types(config)}

    return Aspect(read, write)
