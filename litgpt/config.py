"""The shape of a model: what LitGPT's `model_config.yaml` holds, and the sizes that follow from it."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from litgpt import catalog
from litgpt.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

# LitGPT's fields for architectures that this package does not build, with the value that means "not used".
UNSUPPORTED_FIELDS: dict[str, Any] = {
    "norm_qk": False,
    "norm_qk_type": "default",
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "norm_1": True,
    "norm_2": True,
    "attention_logit_softcapping": None,
    "final_logit_softcapping": None,
    "scale_embeddings": False,
    "rope_interleave": False,
    "moe_intermediate_size": None,
    "n_expert": 0,
    "n_shared_expert": None,
    "n_expert_groups": None,
    "n_topk_groups": None,
    "n_topk_scores_per_group": None,
    "n_expert_per_token": 0,
    "first_k_dense_replace": None,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "latent_attention": None,
    "rope_local_base_freq": None,
    "rope_indices": None,
}

OPTIONAL_SIZES = ("padded_vocab_size", "head_size", "n_query_groups", "intermediate_size", "sliding_window_size")
SIZES = ("block_size", "n_layer", "n_embd", "vocab_size", "padding_multiple", "n_head", *OPTIONAL_SIZES)


@dataclass
class Config:
    """Sizes and options of a decoder. Field names and defaults are LitGPT's, so its `model_config.yaml` files load."""

    name: str = ""
    hf_config: dict[str, str] = field(default_factory=dict)
    """Where the weights come from on the Hugging Face hub: `{"org": ..., "name": ...}`."""
    block_size: int = 4096
    """Longest sequence in tokens."""
    n_layer: int = 16
    n_embd: int = 4096
    vocab_size: int = 50254
    padding_multiple: int = 512
    padded_vocab_size: int | None = None
    """Rows of the embedding; `vocab_size` rounded up to `padding_multiple` unless given."""
    norm_class_name: str = "LayerNorm"
    norm_eps: float = 1e-5
    parallel_residual: bool = True
    shared_attention_norm: bool = False
    """With `parallel_residual`: the MLP reads `norm_1`'s output, and there is no `norm_2`."""
    n_head: int = 32
    head_size: int | None = None
    n_query_groups: int | None = None
    """Key/value heads: `n_head` is multi-head, 1 multi-query, in between grouped-query attention."""
    attn_bias: bool = False
    """Bias on q, k and v (`bias` switches all the other linear layers, and implies this one)."""
    attention_scores_scalar: int | None = None
    """Scores are divided by its square root; `head_size` unless given."""
    sliding_window_size: int | None = None
    sliding_window_indices: list[int] | None = None
    """Per block: 1 where the window applies, 0 where attention is global. All blocks unless given."""
    rope_base: int = 10000
    rotary_percentage: float = 0.25
    rope_condense_ratio: int = 1
    rope_adjustments: dict[str, float] | None = None
    """Llama 3.1's scaling: factor, low_freq_factor, high_freq_factor, original_max_seq_len."""
    intermediate_size: int | None = None
    bias: bool = True
    mlp_class_name: str = "GptNeoxMLP"
    gelu_approximate: str = "none"
    lm_head_bias: bool = False

    def __post_init__(self) -> None:
        for key in SIZES:
            value = getattr(self, key)
            if value is None and key in OPTIONAL_SIZES:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{key} is {value!r}: a whole number from 1 is needed")
        if self.head_size is None:
            if self.n_embd % self.n_head:
                raise UserError(f"n_embd ({self.n_embd}) is not a multiple of n_head ({self.n_head}): give head_size")
            self.head_size = self.n_embd // self.n_head
        if self.padded_vocab_size is None:
            self.padded_vocab_size = -(-self.vocab_size // self.padding_multiple) * self.padding_multiple
        self.vocab_size = min(self.vocab_size, self.padded_vocab_size)
        if self.n_query_groups is None:
            self.n_query_groups = self.n_head
        if self.n_head % self.n_query_groups:
            raise UserError(f"n_head ({self.n_head}) is not a multiple of n_query_groups ({self.n_query_groups})")
        if self.intermediate_size is None:
            if self.mlp_class_name != "GptNeoxMLP":
                raise UserError(f"{self.mlp_class_name} needs intermediate_size")
            self.intermediate_size = 4 * self.n_embd
        if self.sliding_window_size is not None and self.sliding_window_indices is None:
            self.sliding_window_indices = [1] * self.n_layer
        for key, known in (("norm_class_name", ("LayerNorm", "RMSNorm")), ("mlp_class_name", ("GptNeoxMLP", "LLaMAMLP"))):
            if getattr(self, key) not in known:
                raise UserError(f"{key} {getattr(self, key)!r} of model {self.name!r} is not supported: only {', '.join(known)} are")

    @property
    def rope_n_elem(self) -> int:
        """Dimensions of a head that are rotated."""
        assert self.head_size is not None
        return int(self.rotary_percentage * self.head_size)

    @property
    def V(self) -> int:
        """`padded_vocab_size`, known to be set."""
        assert self.padded_vocab_size is not None
        return self.padded_vocab_size

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the joined projection."""
        assert self.head_size is not None and self.n_query_groups is not None
        kv = self.head_size * self.n_query_groups
        return self.head_size * self.n_head, kv, kv

    def base_dict(self) -> dict[str, Any]:
        """The base model's fields, as LitGPT writes them to `model_config.yaml` (without adapters' settings)."""
        names = {f.name for f in fields(Config)}
        return {key: value for key, value in asdict(self).items() if key in names}

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> Self:
        """A named model of the catalogue (`Llama-2-7b-hf`, `meta-llama/Llama-2-7b-hf`). Raises UserError for an unknown name."""
        found = catalog.find(name)
        if found is None:
            near = difflib.get_close_matches(name.rsplit("/", 1)[-1], catalog.names(), n=3, cutoff=0.5)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise UserError(f"no model is named {name!r}{hint}. A Hugging Face folder needs no name: its config.json is read")
        return cls(**{**found, **overrides})

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> Self:
        """A `model_config.yaml`, ours or LitGPT's. Raises UserError for unknown fields and unsupported architectures."""
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} is missing: a checkpoint folder holds it") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not readable YAML: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"{path} holds no settings: convert the checkpoint again")
        known = {f.name for f in fields(cls)}
        problems = []
        for key in [key for key in values if key not in known]:
            value = values.pop(key)
            if key not in UNSUPPORTED_FIELDS:
                problems.append(f"unknown field {key!r}")
            elif value != UNSUPPORTED_FIELDS[key]:
                problems.append(f"{key}: {value!r} is not supported")
        if problems:
            raise UserError(f"{path}: {'; '.join(problems)}")
        try:
            Config(**{key: value for key, value in values.items() if key in Config.__dataclass_fields__})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return cls(**{**values, **overrides})

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: str | Path, **overrides: Any) -> Self:
        """The model of a checkpoint folder, by its `model_config.yaml`."""
        return cls.from_file(Path(checkpoint_dir) / "model_config.yaml", **overrides)

    @classmethod
    def from_hf(cls, source: str | Path | dict[str, Any], **overrides: Any) -> Self:
        """A Hugging Face `config.json` (or its content) of a supported architecture. Raises UserError for what it cannot build."""
        if isinstance(source, dict):
            where, hf = "the Hugging Face config", source
        else:
            where = str(source)
            try:
                hf = json.loads(Path(source).read_text(encoding="utf-8"))
            except FileNotFoundError:
                raise UserError(f"{where} is missing: a Hugging Face folder holds it") from None
            except ValueError as error:
                raise UserError(f"{where} is not valid JSON: {error}") from None
            if not isinstance(hf, dict):
                raise UserError(f"{where} holds no JSON object")
        try:
            return cls(**{**catalog.from_hf(hf), **overrides})
        except KeyError as error:
            raise UserError(f"{where} lacks the key {error}") from None
        except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"{where}: {error}") from None
