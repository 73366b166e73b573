"""Tables that read a Hugging Face config.json into `litgpt.Config` fields, write it from them, and name its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

Hf = Mapping[str, Any]  # content of a config.json
Fields = dict[str, Any]  # of Config
Table = dict[str, tuple[str, str]]  # another format's module -> LitGPT's module and the part of it, see litgpt.convert.names
Names = TypeVar("Names")
REQUIRED: Any = object()  # in place of a default: a config.json without the key is refused


class Key(NamedTuple):
    """The field that a key of config.json stands for."""

    field: str
    default: Any = REQUIRED  # transformers' value where the file lacks the key


class Aspect(NamedTuple):
    """Keys and fields that correspond to each other, but not one to one."""

    read: Callable[[Hf], Fields]  # raises ValueError for what cannot be built
    write: Callable[[Fields], dict[str, Any]]  # from all fields of a Config


@dataclass(frozen=True)
class Variant(Generic[Names]):
    """Other tensor names for the models of an architecture that have certain fields."""

    fields: Fields
    names: Names

    def applies(self, fields: Fields) -> bool:
        """Return True for a model with these Config fields."""
        return all(fields[key] == value for key, value in self.fields.items())


@dataclass(frozen=True)
class Architecture:
    """One `model_type` of transformers."""

    class_name: str  # for `architectures`
    names: Table  # of the tensors in files
    keys: Mapping[str, Key]  # by key of config.json; other names of it follow, after blanks; the last counts
    fixed: Mapping[str, Any] = field(default_factory=dict)  # fields that every such model has
    accepts: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # key: supported values, transformers' default first
    aspects: tuple[Aspect, ...] = ()
    tied: bool = False  # the head is the embedding where config.json does not say
    variant: Variant[Table] | None = None
    spellings: tuple[tuple[str, str], ...] = ()  # other names of tensors: pattern and replacement, which gives a name of the table
    ignored: str = r"(?!)"  # pattern of tensors that the model computes itself

    def read(self, hf: Hf) -> Fields:
        """Return the Config fields of a config.json. Raise ValueError that names every missing key and unsupported value."""
        fields: Fields = {}
        missing: list[str] = []
        problems: list[str] = []
        for names, (name, default) in self.keys.items():
            key = max(filter(hf.__contains__, reversed(names.split())), key=lambda key: hf[key] is not None, default=None)
            if key is not None:
                fields[name] = hf[key]
            elif default is REQUIRED:
                missing.append(repr(names.split()[0]))
            else:
                fields[name] = default
        if missing:
            problems.append(f"lacks the key{'s' * (len(missing) > 1)} {', '.join(missing)}")
        for key, (default, *others) in {"quantization_config": (None, {}), **self.accepts}.items():
            if (value := hf.get(key, default)) not in (default, *others):
                supported = ", ".join(map(repr, (default, *others)))
                problems.append(f"{key} {value!r} is not supported, only {supported} {'are' if others else 'is'}")
        for aspect in self.aspects:
            try:
                fields.update(aspect.read(hf))
            except KeyError as error:
                problems.append(f"lacks the key {error}")
            except ValueError as error:
                problems.append(str(error))
            except (TypeError, AttributeError, ArithmeticError) as error:
                problems.append(f"holds a value of the wrong kind: {error}")
        if problems:
            raise ValueError("; ".join(problems))
        return {**self.fixed, **fields, "vocab_size": fields["padded_vocab_size"]}

    def write(self, fields: Fields, model_type: str) -> dict[str, Any]:
        """Return the config.json of a model with these fields. Raise ValueError where an aspect cannot express it.

        Token ids are null: the tokenizer knows them, and transformers' defaults would be another model's.
        """
        hf: dict[str, Any] = {"architectures": [self.class_name], "model_type": model_type}
        hf.update({names.split()[0]: fields[key.field] for names, key in self.keys.items()})
        hf.update({key: values[0] for key, values in self.accepts.items()})
        for aspect in self.aspects:
            hf.update(aspect.write(fields))
        return {**hf, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def table(block: str, inner: Mapping[str, str], outer: Mapping[str, str]) -> Table:
    """Return the table of a format whose name of a block is `block`, with `{}` for its number.

    `inner` maps modules of a block, `outer` all others, to LitGPT's module and, after a blank, the part of it if not all.
    """
    places = {**{f"{block}.{name}": f"transformer.h.{{}}.{place}" for name, place in inner.items()}, **outer}
    return {name: (module, part or "all") for name, place in places.items() for module, _, part in (place.partition(" "),)}


def sizes(**others: Key) -> dict[str, Key]:
    """Return the keys that nearly every architecture shares, updated with `others`."""
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


def without(keys: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return `keys` without some of them."""
    return {key: value for key, value in keys.items() if key not in names}


def activation(key: str, default: str) -> Aspect:
    """Return the aspect of a GELU, exact or by its tanh approximation, for GptNeoxMLP."""
    names = {"gelu": "none", "gelu_python": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu_fast": "tanh"}

    def read(hf: Hf) -> Fields:
        value = hf.get(key, default)
        if value not in names:
            raise ValueError(f"{key} {value!r} is not supported, only {', '.join(map(repr, names))} are")
        return {"gelu_approximate": names[value]}

    def write(fields: Fields) -> dict[str, Any]:
        usual = "gelu" if fields["gelu_approximate"] == "none" else "gelu_new"
        return {key: default if names[default] == names[usual] else usual}

    return Aspect(read, write)


def _read_biases(hf: Hf) -> Fields:
    attention, mlp = bool(hf.get("attention_bias", False)), bool(hf.get("mlp_bias", False))
    if attention != mlp:
        raise ValueError(f"attention_bias {attention} with mlp_bias {mlp} is not supported: both or none")
    return {"bias": attention}


# Biases in all linear layers or in none.
BIASES = Aspect(_read_biases, lambda fields: {"attention_bias": fields["bias"], "mlp_bias": fields["bias"]})


def window(default: int | None) -> Aspect:
    """Return the aspect of `sliding_window`, in every block."""

    def write(fields: Fields) -> dict[str, Any]:
        return {"sliding_window": fields["sliding_window_size"] if any(fields["sliding_window_indices"] or ()) else None}

    return Aspect(lambda hf: {"sliding_window_size": hf.get("sliding_window", default)}, write)


def read_layer_types(hf: Hf, is_windowed: Callable[[int], bool]) -> list[int]:
    """Return 1 for every block whose attention is over a window: as `layer_types` says, else by the block's number."""
    known = {"full_attention": 0, "sliding_attention": 1}
    types = hf.get("layer_types")
    if types is None:
        n_layer = hf["num_hidden_layers"]
        return [int(is_windowed(i)) for i in range(n_layer)] if isinstance(n_layer, int) else []
    if unknown := sorted({str(kind) for kind in types} - known.keys()):
        raise ValueError(f"layer_types {', '.join(unknown)} are not supported, only {', '.join(known)} are")
    return [known[kind] for kind in types]


def layer_types(fields: Fields) -> list[str]:
    """Return `layer_types` of config.json."""
    indices = fields["sliding_window_indices"] or [0] * fields["n_layer"]
    return ["sliding_attention" if windowed else "full_attention" for windowed in indices]


def local_windows(size: int | None, is_windowed: Callable[[int], bool] = lambda i: True) -> Aspect:
    """Return the aspect of `sliding_window`, by default `size`, in the blocks that `layer_types` names or `is_windowed` selects."""

    def read(hf: Hf) -> Fields:
        window = hf.get("sliding_window", size)
        return {"sliding_window_size": window, "sliding_window_indices": read_layer_types(hf, is_windowed) if window else None}

    def write(fields: Fields) -> dict[str, Any]:
        return {"sliding_window": fields["sliding_window_size"], "layer_types": layer_types(fields)}

    return Aspect(read, write)


def optional_window(is_windowed: Callable[[int, Hf], bool]) -> Aspect:
    """Return the aspect of `use_sliding_window`: a window in the blocks that `layer_types` names or, without it, `is_windowed` selects."""

    def read(hf: Hf) -> Fields:
        size = hf.get("sliding_window", 4096) if hf.get("use_sliding_window", False) else None
        blocks = read_layer_types(hf, lambda i: is_windowed(i, hf)) if size else []
        return {"sliding_window_size": size, "sliding_window_indices": blocks} if any(blocks) else {"sliding_window_size": None}

    def write(fields: Fields) -> dict[str, Any]:
        blocks, size = fields["sliding_window_indices"] or [], fields["sliding_window_size"]
        if size is None or not any(blocks):
            return {"use_sliding_window": False, "sliding_window": None}
        return {"use_sliding_window": True, "sliding_window": size, "layer_types": layer_types(fields)}

    return Aspect(read, write)


def _read_dense(hf: Hf) -> Fields:
    step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    if step != 1 or sorted(dense) != list(range(len(dense))):
        raise ValueError(
            f"decoder_sparse_step {step} with mlp_only_layers {dense} is not supported: experts in all blocks but the first ones are"
        )
    return {"first_k_dense_replace": len(dense) or None}


# The blocks of Qwen's mixtures that are dense.
DENSE_FIRST = Aspect(
    _read_dense, lambda fields: {"decoder_sparse_step": 1, "mlp_only_layers": list(range(fields["first_k_dense_replace"] or 0))}
)


def _write_four_times(fields: Fields) -> dict[str, Any]:
    if fields["intermediate_size"] != 4 * fields["n_embd"]:
        raise ValueError("only an MLP of four times the width can be written")
    return {}


# Architectures without a key for the width of the MLP.
FOUR_TIMES = Aspect(lambda hf: {}, _write_four_times)
