"""The shape of a model: the fields of LitGPT's `model_config.yaml`, and the sizes that follow from them."""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt import families
from litgpt.args import is_number
from litgpt.errors import UserError
from litgpt.families._rope import from_litgpt, scaling_kind
from litgpt.files import expand_path, read_json, read_yaml

if TYPE_CHECKING:
    from typing_extensions import Self, TypeIs

GROUPS = ("n_expert_groups", "n_topk_groups", "n_topk_scores_per_group")
OF_EXPERTS = ("n_shared_expert", *GROUPS, "first_k_dense_replace")
COUNTS = ("n_expert", "n_expert_per_token", "n_shared_expert", "first_k_dense_replace")  # may be 0
SHARES = {"rotary_percentage": 1.0, "router_aux_loss_coef": math.inf}  # may also be 0; their maximum
MOST_SIZE, MOST_BLOCKS, MOST_FACTOR = 2**31 - 1, 10_000, 1e18  # a broken file's sizes must not overflow, nor take hours to build
SCALARS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
# LitGPT 0.5.13 lacks OWN_FIELDS, its older versions also NEWER_FIELDS
OF_GPT_OSS = ("attention_sinks", "router_bias", "swiglu_limit", "swiglu_alpha")
OWN_FLAGS = ("norm_affine", "norm_bias", "norm_embedding", "learned_positions", "shared_expert_gate", "router_softmax")
OWN_FIELDS = (*OWN_FLAGS, "alibi", "alibi_scaled", "clip_qkv", "router_aux_loss_coef", *SCALARS, *OF_GPT_OSS)
NEWER_FIELDS = ("rope_interleave", "latent_attention", "routed_scaling_factor", *OF_EXPERTS)
CORRECTION = "e_score_correction_bias"  # a router's buffer, fp32 in every checkpoint: see `litgpt.mlp.route`
CHOICES: dict[str, tuple[str, ...]] = {
    "norm_class_name": ("LayerNorm", "RMSNorm"),
    "norm_qk_type": ("default", "olmo2"),
    "mlp_class_name": ("GptNeoxMLP", "LLaMAMLP", "GemmaMLP", "LLaMAMoE"),
    "gelu_approximate": ("none", "tanh"),
}
LATENT = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")  # the first may be null
NOT_LATENT = ("norm_qk", "rope_indices", "learned_positions", "clip_qkv", "alibi", "attention_sinks")
CHOSEN_TAPS = "skip2lora_block_indices"  # in an adapter's model_config.yaml: the blocks that `auto` chose
PER_BLOCK: dict[str, tuple[int, ...]] = {"sliding_window_indices": (0, 1), "rope_indices": (-1, 0, 1)}  # lists, and their entries
ROPE_KEYS: dict[str, tuple[str, ...]] = {  # of `rope_adjustments`, for each kind of scaling
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"),
    "yarn": ("factor", "original_max_seq_len", "beta_fast", "beta_slow", "attention_factor"),
    "longrope": ("short_factor", "long_factor", "original_max_seq_len", "attention_factor"),
}


def find_multiple(n: int, k: int) -> int:
    """Return the smallest multiple of k from n on."""
    return -(-n // k) * k


def __getattr__(name: str) -> Any:
    """Return LitGPT's `configs`, the fields of each named model, or `name_to_config`, the same by name."""
    if name not in ("configs", "name_to_config"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    rows = {key: families.find(key) or {} for key in families.names()}
    return rows if name == "name_to_config" else list(rows.values())


def _is_affine(norm: Any, name: Any) -> bool:
    """Return True if norms have weights, which LitGPT infers without a field."""
    return norm != "LayerNorm" or "OLMo" not in str(name)


def _router_loss(values: dict[str, Any]) -> float:
    """Return the default of `router_aux_loss_coef`, a field that LitGPT lacks: the named model's, else transformers' for most mixtures."""
    if row := families.find(str(values.get("name"))):
        return float(row.get("router_aux_loss_coef", 0.0))
    return 0.001 if values.get("mlp_class_name") == "LLaMAMoE" and not values.get("n_expert_groups") else 0.0


def _is_positive(value: Any) -> TypeIs[float]:
    return is_number(value) and 0 < value <= MOST_FACTOR


@dataclass
class Config:
    """Sizes and options of a decoder. Field names and defaults are LitGPT's, so its `model_config.yaml` files load."""

    name: str = ""
    hf_config: dict[str, str] = field(default_factory=dict)  # {"org": ..., "name": ...} on the Hugging Face hub
    block_size: int = 4096  # longest sequence in tokens
    n_layer: int = 16
    n_embd: int = 4096
    vocab_size: int = 50254
    padding_multiple: int = 512
    # `None` stands for a size that follows from the others: `__post_init__` sets it
    padded_vocab_size: int = None  # type: ignore[assignment]  # rows of the embedding; `vocab_size` rounded up
    norm_class_name: str = "LayerNorm"
    norm_eps: float = 1e-5
    norm_affine: bool = True  # norms have weights; LitGPT has no such field and infers it from the name, see `from_file`
    norm_bias: bool = True  # of LayerNorm
    norm_embedding: bool = False  # normalise the embeddings (BLOOM)
    norm_1: bool = True  # normalise attention's input, and `norm_2` the MLP's; OLMo 2 normalises outputs only
    norm_2: bool = True
    norm_qk: bool = False  # normalise queries and keys
    norm_qk_type: str = "default"  # or "olmo2": all heads together instead of each by itself
    post_attention_norm: bool = False  # normalise attention's output before it joins the residual stream
    post_mlp_norm: bool = False  # normalise the MLP's output before it joins the residual stream
    parallel_residual: bool = True
    shared_attention_norm: bool = False  # with `parallel_residual`: the MLP reads `norm_1`'s output, and there is no `norm_2`
    n_head: int = 32
    head_size: int = None  # type: ignore[assignment]
    n_query_groups: int = None  # type: ignore[assignment]  # key/value heads: `n_head` is multi-head, 1 multi-query, else grouped-query
    attn_bias: bool = False  # bias on q, k and v; `bias` switches all linear layers
    clip_qkv: float | None = None  # c: queries, keys and values are clamped to [-c, c]
    attention_scores_scalar: float | None = None  # scores are divided by its square root; `head_size` unless given
    latent_attention: dict[str, Any] | None = None  # sizes of LATENT, see `litgpt.latent`; `head_size` follows from them
    attention_sinks: bool = False  # each head's softmax has one more score, a trained one, with value 0 (gpt-oss)
    attention_logit_softcapping: float | None = None  # c: scores become c tanh(scores / c), before the mask
    sliding_window_size: int | None = None
    sliding_window_indices: list[int] | None = None  # per block: 1 for a window (default: all), 0 for global attention
    rope_base: float = 10000
    rotary_percentage: float = 0.25
    rope_condense_ratio: float = 1
    rope_adjustments: dict[str, Any] | None = None  # scaling of the rotary frequencies, see `litgpt.rope`
    rope_local_base_freq: float | None = None  # the rotary base of the blocks that `rope_indices` marks with 1 (without scaling)
    rope_indices: list[int] | None = None  # per block: 0 for `rope_base`, 1 for `rope_local_base_freq`, -1 for no rotation (SmolLM3)
    rope_interleave: bool = False  # of latent attention: the rotated pairs are neighbours instead of halves
    alibi: bool = False  # distances lower the scores, without rotation, see `litgpt.attention.alibi`
    alibi_scaled: bool = False  # divided by sqrt(head_size), as the scores are (Falcon)
    learned_positions: bool = False  # add a trained vector per position to the embeddings instead of rotating queries and keys (GPT-2)
    intermediate_size: int = None  # type: ignore[assignment]
    moe_intermediate_size: int | None = None  # the width of each expert, where it is not `intermediate_size`
    bias: bool = True
    mlp_class_name: str = "GptNeoxMLP"
    gelu_approximate: str = "none"
    n_expert: int = 0
    n_expert_per_token: int = 0
    norm_topk_prob: bool = True  # scale the chosen experts' weights to sum 1, as LitGPT's LLaMAMoE always does
    router_aux_loss_coef: float = 0.0  # weight of the router's load-balancing loss in training
    router_bias: bool = False  # on the router's logits
    swiglu_limit: float | None = None  # c: the experts clamp SwiGLU's inputs, see `litgpt.mlp.ClampedMLP`
    swiglu_alpha: float = 1.702  # of the sigmoid, with `swiglu_limit`
    n_shared_expert: int | None = None  # experts that every token passes, joined in one MLP
    shared_expert_gate: bool = False  # the shared experts' output is weighted by a sigmoid (Qwen 2)
    n_expert_groups: int | None = None  # a token's experts are in `n_topk_groups` of the groups, see `litgpt.mlp.route`
    n_topk_groups: int | None = None
    n_topk_scores_per_group: int | None = None  # number of experts whose scores rank a group
    router_softmax: bool = False  # scores of experts in groups: softmax (DeepSeek-V2) instead of sigmoids with a bias (V3)
    routed_scaling_factor: float = 1.0  # of the chosen experts' weights
    first_k_dense_replace: int | None = None  # the first blocks of a mixture, whose MLPs are dense
    scale_embeddings: bool = False  # multiply the embeddings by sqrt(n_embd) (Gemma)
    embedding_multiplier: float = 1.0  # Granite: a factor on the embeddings,
    residual_multiplier: float = 1.0  # on what a block adds to the residual stream,
    logits_scaling: float = 1.0  # and the divisor of the logits
    lm_head_bias: bool = False
    final_logit_softcapping: float | None = None  # c: logits become c tanh(logits / c)

    def __post_init__(self) -> None:
        self._check_values()
        self._check_latent()
        self.name = self.name or self.hf_config.get("name", "")
        if not isinstance(self.name, str):
            raise UserError(f"name is {repr(self.name)[:60]}: a text is needed")
        if self.head_size is None:
            if self.n_embd % self.n_head:
                raise UserError(f"n_embd ({self.n_embd}) is not a multiple of n_head ({self.n_head}): give head_size")
            self.head_size = self.n_embd // self.n_head
        if self.padded_vocab_size is None:
            self.padded_vocab_size = find_multiple(self.vocab_size, self.padding_multiple)
        self.vocab_size = min(self.vocab_size, self.padded_vocab_size)
        if self.n_query_groups is None:
            self.n_query_groups = self.n_head
        if self.n_head % self.n_query_groups:
            raise UserError(f"n_head ({self.n_head}) is not a multiple of n_query_groups ({self.n_query_groups})")
        if self.intermediate_size is None:
            if self.mlp_class_name == "LLaMAMLP":
                raise UserError(f"{self.mlp_class_name} needs intermediate_size")
            self.intermediate_size = 4 * self.n_embd
        if self.sliding_window_size is not None and self.sliding_window_indices is None:
            self.sliding_window_indices = [1] * self.n_layer
        if self.shared_attention_norm and not self.parallel_residual:
            raise UserError("shared_attention_norm is true: only blocks with parallel_residual can share their norm")
        self._check_experts()
        if self.alibi_scaled and not self.alibi:
            raise UserError("alibi_scaled is true: it needs alibi")
        others = ("learned_positions", "sliding_window_size", "attention_logit_softcapping", "attention_sinks", "rope_indices")
        if self.alibi and (found := [key for key in others if getattr(self, key)]):
            raise UserError(f"alibi does not go with {', '.join(found)}")
        self._check_blocks()
        self.rope_adjustments, stretch = from_litgpt(self.rope_adjustments)
        if stretch != 1:
            self.attention_scores_scalar = (self.attention_scores_scalar or self.head_size) / stretch**4
        self._check_rope()

    def _check_values(self) -> None:
        """Raise UserError for the first field whose value is not what its type says, or out of range."""
        for item in fields(self):
            key, kind, value = item.name, item.type, getattr(self, item.name)
            if kind == "bool" and not isinstance(value, bool):
                raise UserError(f"{key} is {value!r}: true or false is needed")
            if key not in Config.__dataclass_fields__ or (value is None and item.default is None):  # an adapter's, or left out
                continue
            least, limit = int(key not in COUNTS), MOST_BLOCKS if key == "n_layer" else MOST_SIZE
            if kind in ("int", "int | None") and (type(value) is not int or not least <= value <= limit):
                raise UserError(f"{key} is {repr(value)[:60]}: a whole number from {least} to {limit} is needed")
            if kind in ("float", "float | None") and key not in SHARES and not _is_positive(value):
                raise UserError(f"{key} is {value!r}: a positive number, at most {MOST_FACTOR:g}, is needed")
        if not isinstance(self.hf_config, dict):
            raise UserError(f"hf_config is {repr(self.hf_config)[:60]}: a mapping of org and name is needed")
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise UserError(f"{key} {getattr(self, key)!r} of model {self.name!r} is not supported: only {', '.join(known)} are")
        for key, most in SHARES.items():
            value = getattr(self, key)
            if (not _is_positive(value) and value != 0) or value > most:
                raise UserError(f"{key} is {value!r}: a number from 0{'' if most == math.inf else ' to 1'} is needed")

    def _check_latent(self) -> None:
        """Raise UserError for wrong sizes of latent attention and for incompatible settings. Set the size of a head."""
        sizes = self.latent_attention
        if sizes is None:
            if self.rope_interleave:
                raise UserError("rope_interleave is true: only latent_attention has that")
            return
        if not isinstance(sizes, dict) or set(sizes) != set(LATENT):
            raise UserError(f"latent_attention is {str(sizes)[:100]}: a mapping of {', '.join(LATENT)} is needed")
        for key, value in sizes.items():
            if not (value is None and key == LATENT[0]) and (type(value) is not int or not 0 < value <= MOST_SIZE):
                raise UserError(f"latent_attention: {key} is {value!r}, a whole number from 1 is needed")
        others = {"n_query_groups": self.n_query_groups not in (None, self.n_head), "bias": self.bias, "attn_bias": self.attn_bias}
        others |= {key: bool(getattr(self, key)) for key in NOT_LATENT}
        if found := [key for key, is_so in others.items() if is_so]:
            raise UserError(f"latent_attention does not go with {', '.join(f'{key} {getattr(self, key)}' for key in found)}")
        self.head_size = sizes["qk_rope_head_dim"] + sizes["qk_nope_head_dim"]

    def _check_experts(self) -> None:
        """Raise UserError for settings of a mixture that do not fit each other."""
        if self.mlp_class_name != "LLaMAMoE":
            if found := [
                key for key in (*OF_EXPERTS, "shared_expert_gate", "router_softmax", "router_bias", "swiglu_limit") if getattr(self, key)
            ]:
                raise UserError(f"{', '.join(found)}: only a mixture of experts, mlp_class_name LLaMAMoE, has that")
            return
        E, k = self.n_expert, self.n_expert_per_token
        if not 1 <= k <= E:
            raise UserError(
                f"LLaMAMoE with n_expert {E} and n_expert_per_token {k}: a token needs at least 1 expert and at most all of them"
            )
        if self.swiglu_limit and self.first_k_dense_replace:
            raise UserError("swiglu_limit does not go with first_k_dense_replace")
        if self.router_bias and self.n_expert_groups:
            raise UserError("router_bias does not go with n_expert_groups")
        if self.shared_expert_gate and not self.n_shared_expert:
            raise UserError("shared_expert_gate is true: it needs n_shared_expert")
        if (self.first_k_dense_replace or 0) > self.n_layer:
            raise UserError(f"first_k_dense_replace is {self.first_k_dense_replace}: the model has {self.n_layer} blocks")
        groups, open_groups, scores = (getattr(self, key) for key in GROUPS)
        if groups is None:
            if open_groups or scores or self.router_softmax:
                raise UserError("n_topk_groups, n_topk_scores_per_group and router_softmax need n_expert_groups")
            return
        size = E // groups
        if E % groups or not open_groups or not scores or open_groups > groups or scores > size or k > open_groups * size:
            raise UserError(
                f"n_expert_groups {groups} for n_expert {E}, with n_topk_groups {open_groups}, n_topk_scores_per_group {scores} and "
                f"n_expert_per_token {k}: groups of equal size are needed, and no more of a token's groups and experts than there are"
            )
        if self.router_aux_loss_coef and not self.router_softmax:
            raise UserError("router_aux_loss_coef: experts in groups are balanced by the router's bias, without a loss. Leave it out")

    def _check_blocks(self) -> None:
        """Raise UserError for a list of one entry per block that has the wrong length or entries."""
        for key, known in PER_BLOCK.items():
            entries = getattr(self, key)
            if entries is None:
                continue
            if not isinstance(entries, list | tuple) or len(entries) != self.n_layer:
                length = f"{len(entries)} entries" if isinstance(entries, list | tuple) else "no list"
                raise UserError(f"{key} has {length}: one for each of the {self.n_layer} blocks (n_layer) is needed")
            wrong = [entry for entry in entries if entry not in known]
            if wrong:
                raise UserError(f"{key} holds {wrong[0]!r}: its entries are {', '.join(map(str, known))}")
        if self.rope_indices and 1 in self.rope_indices and self.rope_local_base_freq is None:
            raise UserError("rope_indices marks blocks with 1, which need rope_local_base_freq")

    def _check_rope(self) -> None:
        """Raise UserError for keys and values of `rope_adjustments` that no kind of scaling has."""
        if self.rope_n_elem % 2:
            raise UserError(
                f"rotary_percentage {self.rotary_percentage} of head_size {self.head_size} is {self.rope_n_elem}: pairs are rotated"
            )
        adjustments = self.rope_adjustments
        if adjustments is None:
            return
        if not isinstance(adjustments, dict):
            raise UserError(f"rope_adjustments is {adjustments!r}: a mapping is needed")
        kind = self.rope_kind
        if kind not in ROPE_KEYS:
            raise UserError(f"rope_adjustments: rope_type {kind!r} is not supported; supported are {', '.join(ROPE_KEYS)}")
        keys = ROPE_KEYS[kind]
        optional = ("rope_type", "truncate") if kind == "yarn" else ("rope_type",)
        problems = [f"{key} is missing" for key in keys if key not in adjustments]
        problems += [f"{key} is not known" for key in adjustments if key not in (*keys, *optional)]
        for key in (key for key in keys if key in adjustments):
            value = adjustments[key]
            if key.endswith("_factor") and kind == "longrope" and key != "attention_factor":
                size = self.rope_n_elem // 2
                if not isinstance(value, list | tuple) or len(value) != size or not all(map(_is_positive, value)):
                    problems.append(f"{key} must list {size} positive numbers, one for each rotated pair")
            elif not _is_positive(value):
                problems.append(f"{key} is {value!r}, a positive number is needed")
        if problems:
            raise UserError(f"rope_adjustments for {kind} scaling: {'; '.join(problems)}. Its keys are {', '.join(keys)}")

    @property
    def rope_kind(self) -> str | None:
        """The kind of scaling in `rope_adjustments`, a key of ROPE_KEYS, or None."""
        return scaling_kind(self.rope_adjustments)

    @property
    def rope_n_elem(self) -> int:
        """The number of rotated dimensions of a head."""
        return self.latent_sizes[2] if self.latent_attention else int(self.rotary_percentage * self.head_size)

    @property
    def V(self) -> int:
        """`padded_vocab_size`"""
        return self.padded_vocab_size

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the joined projection."""
        kv = self.head_size * self.n_query_groups
        return self.head_size * self.n_head, kv, kv

    @property
    def rotates(self) -> bool:
        """True if queries and keys are rotated by their positions."""
        return not (self.learned_positions or self.alibi)

    @property
    def needs_mask(self) -> bool:
        """True if attention is not torch's own, which needs no explicit causal mask."""
        return self.attention_logit_softcapping is not None or self.attention_sinks

    @property
    def latent_sizes(self) -> tuple[int | None, int, int, int, int]:
        """The sizes of latent attention, in the order of LATENT."""
        assert self.latent_attention is not None
        return tuple(self.latent_attention[key] for key in LATENT)

    @property
    def cache_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The heads of the key/value cache and their size, of keys and of values."""
        if self.latent_attention:
            return (1, self.latent_sizes[1]), (1, self.latent_sizes[2])
        return ((self.n_query_groups, self.head_size),) * 2

    @property
    def expert_size(self) -> int:
        """The width of an expert."""
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def unit_offset(self) -> bool:
        """True if every RMSNorm multiplies by 1 + weight, as Gemma's do."""
        return self.mlp_class_name == "GemmaMLP"

    def base_dict(self) -> dict[str, Any]:
        """Return the base model's fields (without adapters' settings)."""
        return {key: value for key, value in asdict(self).items() if key in Config.__dataclass_fields__}

    def file_dict(self) -> dict[str, Any]:
        """Return the fields in `model_config.yaml`. LitGPT 0.5.13 reads it, so fields that it lacks are left out at their default."""
        plain = {key: getattr(Config, key) for key in (*OWN_FIELDS, *NEWER_FIELDS)}
        plain["norm_affine"] = _is_affine(self.norm_class_name, self.name)
        plain["router_aux_loss_coef"] = _router_loss(self.base_dict())
        return {key: value for key, value in self.base_dict().items() if key not in plain or value != plain[key]}

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> Self:
        """Return a named model (`Llama-2-7b-hf`, `meta-llama/Llama-2-7b-hf`). Raise UserError for an unknown name."""
        row = families.find(name)
        if row is None:
            near = difflib.get_close_matches(name.rsplit("/", 1)[-1], families.names(), n=3, cutoff=0.5)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise UserError(f"no model is named {name!r}{hint}. A Hugging Face folder needs no name: its config.json is read")
        blocks = {key: row[key][: overrides.get("n_layer")] for key in PER_BLOCK if row.get(key)}  # a shorter model's first blocks
        return cls(**{**row, **blocks, **overrides})

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> Self:
        """Load a `model_config.yaml`, ours or LitGPT's. Raise UserError for unknown fields and unsupported architectures."""
        path = expand_path(path)
        values = read_yaml(path, "is missing: a checkpoint folder holds it")
        if not isinstance(values, dict):
            raise UserError(f"{path} holds no settings: convert the checkpoint again")
        known = {f.name for f in fields(cls)}
        if CHOSEN_TAPS not in known:
            values.pop(CHOSEN_TAPS, None)
        problems = []
        all_fields = values.keys().isdisjoint(OWN_FIELDS) and any(values.get(key, ...) == getattr(Config, key) for key in NEWER_FIELDS)
        if all_fields and not values.get("n_expert_groups"):  # LitGPT wrote it, which leaves out no field
            values.pop("norm_topk_prob", None)
        elif "LLaMAMoE" in str(values.get("mlp_class_name")):
            values.setdefault("router_aux_loss_coef", _router_loss(values))
        values.setdefault("norm_affine", _is_affine(values.get("norm_class_name", "LayerNorm"), values.get("name")))
        for key in [key for key in values if key not in known]:
            del values[key]
            near = difflib.get_close_matches(str(key), known, n=1)
            problems.append(f"unknown field {str(key)[:60]!r}" + (f" (did you mean {near[0]}?)" if near else ""))
        if problems:
            raise UserError(f"{path}: {'; '.join(problems)}")
        try:
            Config(**{key: value for key, value in values.items() if key in Config.__dataclass_fields__})
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return cls(**{**values, **overrides})

    @classmethod
    def from_checkpoint(cls, path: str | Path, **overrides: Any) -> Self:
        """Load the `model_config.yaml` of a checkpoint folder."""
        return cls.from_file(Path(path) / "model_config.yaml", **overrides)

    @classmethod
    def from_hf(cls, source: str | Path | dict[str, Any], **overrides: Any) -> Self:
        """Load a Hugging Face `config.json` (or its content). Raise UserError for an unsupported architecture or setting."""
        if isinstance(source, dict):
            where, hf = "the Hugging Face config", source
        else:
            where, hf = str(source), read_json(source, "is missing: a Hugging Face folder holds it")
        try:
            return cls(**{**families.from_hf(hf), **overrides})
        except KeyError as error:
            raise UserError(f"{where} lacks the key {error}") from None
        except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(f"{where}: {error}") from None
