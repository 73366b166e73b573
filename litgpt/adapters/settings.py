"""The settings of LoRA and Skip2-LoRA, shared by the commands and by `litgpt.lora.Config`. Light: torch is not imported.

The string below each field is its help text on the command line.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Optional, Union, get_args

from litgpt.adapters.patterns import matching, names_of, require_patterns
from litgpt.args import ABOVE_0, COUNT, FROM_0, Range, require_ranges, setting
from litgpt.errors import UserError

BlockIndices = Optional[Union[int, list[Union[int, str]], str]]
Variant = Literal["lora", "dora", "pissa", "olora"]
ValueHeadKind = Literal["linear", "mlp"]
TapNorm = Literal["rms", "none"]
MAX_RANK = 2**16
MOST_HEADS = 16
RANK, LAYER_RANK, DROPOUT = Range(0, MAX_RANK, whole=True), Range(1, MAX_RANK, whole=True), Range(0, 1, below=True)
MODULES = {  # names of the modules that can be saved, here and in transformers -> here
    **dict.fromkeys(("wte", "embed_tokens", "embed_in", "word_embeddings"), "wte"),
    **dict.fromkeys(("lm_head", "embed_out"), "lm_head"),
}
LAYER_FLAGS = ("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp", "lora_head")
HEADS = ("value_head", "mtp_heads")
UNMERGEABLE = {  # settings whose adapters no weight of the base can take in -> what they are
    "skip2lora_enabled": "a Skip2-LoRA adapter",
    "alora_enabled": "an answer-only LoRA adapter",
    **dict.fromkeys(HEADS, "an adapter with heads"),
}


@dataclass(kw_only=True)
class AdapterSettings:
    """Which adapters a model has, and their sizes. The defaults attach none."""

    lora_r: int = setting(0, RANK, varies=True)
    """Rank of the adapters."""
    lora_alpha: int = setting(1, Range(), varies=True)
    """Adapters are scaled by lora_alpha / lora_r."""
    lora_dropout: float = setting(0.0, DROPOUT, varies=True)
    """Dropout on the adapters' input."""
    lora_variant: Variant = setting("lora", varies=True)
    """lora; dora: weight-decomposed LoRA, which also learns the length of each row of a weight; pissa or olora: LoRA that starts from the
    weight's largest singular directions, or from its QR decomposition."""
    lora_rslora: bool = setting(False, varies=True)
    """Scale LoRA by lora_alpha / sqrt(lora_r) (rsLoRA), which suits high ranks."""
    lora_rank_pattern: Optional[dict[str, int]] = setting(None, varies=True)
    """Layers with their own rank, as in PEFT's rank_pattern: --lora_rank_pattern.q_proj 4, or a name or regular expression such as
    attn.proj, mlp.fc_1 or h.[0-9].attn.qkv in YAML."""
    lora_alpha_pattern: Optional[dict[str, float]] = setting(None, varies=True)
    """Layers with their own alpha, as in PEFT's alpha_pattern."""
    lora_freeze_a: bool = setting(False, varies=True)
    """Train only B and keep the initial A (LoRA-FA): less memory, as the adapted layers' inputs are not kept."""
    lora_query: bool = setting(False, varies=True)
    """LoRA on the query projections."""
    lora_key: bool = setting(False, varies=True)
    """LoRA on the key projections."""
    lora_value: bool = setting(False, varies=True)
    """LoRA on the value projections."""
    lora_projection: bool = setting(False, varies=True)
    """LoRA on attention's output projections."""
    lora_mlp: bool = setting(False, varies=True)
    """LoRA on the layers of the MLPs."""
    lora_head: bool = setting(False, varies=True)
    """LoRA on the output head."""
    lora_block_indices: BlockIndices = setting(None, varies=True)
    """Blocks that get LoRA, in the format of skip2lora_block_indices. The blocks before the first of them run frozen and are cached.
    Default: all."""
    modules_to_save: Optional[list[str]] = setting(None)
    """Modules to train in full and save alongside LoRA: wte (the embedding) and lm_head (the output layer). If the base ties the
    two, name both."""
    alora_enabled: bool = False
    """Answer-only LoRA (aLoRA): LoRA acts from the tokens that open a reply. Prompts run on the plain model: their keys and values are
    computed once and cached, and an epoch computes only the replies."""
    alora_invocation_tokens: Optional[list[int]] = None
    """The token ids that open a reply and switch LoRA on. Default: those that the prompt style writes between a prompt and its reply."""
    value_head: Optional[ValueHeadKind] = setting(None, varies=True)
    """A head that estimates how good an answer is, linear or with a hidden layer, trained by objective critic or verifiable."""
    mtp_heads: int = setting(0, Range(0, MOST_HEADS, whole=True), varies=True)
    """Heads that predict the tokens after the next one, for `litgpt generate --speculate heads`: trained together with LoRA and
    Skip2-LoRA, or alone, on a frozen model, if these are off."""
    mtp_taps: bool = False
    """Let these heads also read the outputs of a low, a middle and a high block, as EAGLE-3 does: the first, the middle and the last of
    those that Skip2-LoRA taps; for heads that are trained alone, the third, the middle and the third last."""
    skip2lora_enabled: bool = setting(False, varies=True)
    """Train Skip2-LoRA adapters, from the blocks' outputs straight to skip2lora_output_layer. LoRA then applies only behind its input."""
    skip2lora_block_indices: BlockIndices = setting(None, varies=True, older_names=("skip2lora_positions",))
    """Blocks to tap: [0, 1, -1], all, last:6, every:5 or names such as transformer.h.3. auto:6 (or auto) chooses 6 before training, from
    the outputs of all blocks on a sample of the training data. Default: the last 6."""
    skip2lora_output_layer: str = "lm_head"
    """The layer whose input the adapters' sum is added to: lm_head, transformer.ln_f or transformer.h.M."""
    skip2lora_norm: TapNorm = "rms"
    """rms divides a block's output by its root mean square before its adapter; none does not."""
    skip2lora_r: Optional[int] = setting(None, RANK, varies=True)
    """Rank of the Skip2-LoRA adapters. Default: lora_r."""
    skip2lora_alpha: Optional[int] = setting(None, Range(), varies=True)
    """Their alpha. Default: lora_alpha."""
    skip2lora_dropout: Optional[float] = setting(None, DROPOUT, varies=True)
    """Their dropout. Default: lora_dropout."""

    def __post_init__(self) -> None:
        for key, kind in (("skip2lora_norm", TapNorm), ("lora_variant", Variant), ("value_head", ValueHeadKind)):
            value, names = getattr(self, key), get_args(kind)
            if value not in names and not (key == "value_head" and value is None):
                raise UserError(f"{key} is {value!r}: choose {', '.join(map(repr, names[:-1]))} or {names[-1]!r}")
        require_ranges(self)
        if self.alora_enabled and self.lora_variant != "lora":
            raise UserError("alora_enabled works with lora_variant lora only")
        if self.alora_enabled and not self.has_lora_in_blocks:
            raise UserError("alora_enabled needs LoRA in the blocks: set lora_r and lora_query, lora_mlp, ...")
        if self.mtp_taps and not self.mtp_heads:
            raise UserError("mtp_taps needs heads that read them: set mtp_heads to 1 or more, also in a sweep with grid.mtp_heads")
        if self.mtp_taps and not self.skip2lora_enabled and self.changes_text:
            raise UserError(
                "mtp_taps is for mtp_heads that are trained alone or with Skip2-LoRA: LoRA in the blocks changes their outputs, and "
                "nothing could be cached"
            )
        require_patterns("lora_rank_pattern", self.lora_rank_pattern or {}, LAYER_RANK)
        require_patterns("lora_alpha_pattern", self.lora_alpha_pattern or {}, Range())
        self._require_modules()
        if self.skip2lora_enabled and not (self.lora_r if self.skip2lora_r is None else self.skip2lora_r):
            raise UserError("skip2lora_enabled needs a rank: set lora_r (or skip2lora_r) to 1 or more")

    def _require_modules(self) -> None:
        """Translate the modules to save to this package's names. Raise UserError for unknown ones, and for settings that exclude them."""
        if not self.modules_to_save:
            self.modules_to_save = None
            return
        names = self.modules_to_save if isinstance(self.modules_to_save, list) else [self.modules_to_save]
        if unknown := [str(name) for name in names if str(name).rpartition(".")[2] not in MODULES]:
            raise UserError(f"modules_to_save names {', '.join(unknown)[:100]}: wte (the embedding) and lm_head can be trained in full")
        self.modules_to_save = sorted({MODULES[str(name).rpartition(".")[2]] for name in names}, reverse=True)
        obstacles = {
            "lora_head": self.lora_r > 0 and self.lora_head and "lm_head" in self.modules_to_save,
            "alora_enabled": self.alora_enabled,
            "skip2lora_enabled, whose cache holds for a frozen embedding": self.skip2lora_enabled and "wte" in self.modules_to_save,
            **dict.fromkeys(self.heads, True),
        }
        if found := [name for name, is_so in obstacles.items() if is_so]:
            raise UserError(
                f"modules_to_save [{', '.join(self.modules_to_save)}] does not work with {', '.join(found)}: leave one of them out"
            )

    def size_of(self, unit: str) -> tuple[int, float]:
        """Return rank and alpha of LoRA on a unit (`litgpt.adapters.patterns`)."""
        ranks, alphas, names = self.lora_rank_pattern or {}, self.lora_alpha_pattern or {}, names_of(unit)
        return ranks.get(matching(ranks, *names) or "", self.lora_r), alphas.get(matching(alphas, *names) or "", self.lora_alpha)

    def scale_of(self, unit: str) -> float:
        """Return the factor of LoRA's product on a unit."""
        return scaling(*self.size_of(unit), self.lora_rslora)

    def require_warmup(self, key: str) -> None:
        """Raise UserError, naming `key`, if there is no LoRA to train before Skip2-LoRA."""
        if not (self.skip2lora_enabled and self.has_lora_in_blocks):
            raise UserError(f"{key} needs skip2lora_enabled and LoRA to train: set lora_r and lora_query, lora_mlp, ...")

    @property
    def changes_text(self) -> bool:
        """True if adapters change the model's output."""
        return self.has_lora_in_blocks or self.skip2lora_enabled or (self.lora_r > 0 and self.lora_head) or bool(self.modules_to_save)

    @property
    def heads(self) -> list[str]:
        """The settings that add a head next to the output layer."""
        return [name for name in HEADS if getattr(self, name)]

    @property
    def is_mergeable(self) -> bool:
        """True if the adapters can be folded into the base's weights."""
        return not any(getattr(self, key) for key in UNMERGEABLE)

    @property
    def has_lora_in_blocks(self) -> bool:
        """True if linear layers of the blocks get LoRA."""
        return self.lora_r > 0 and any(getattr(self, flag) for flag in LAYER_FLAGS if flag != "lora_head")


@dataclass(kw_only=True)
class WarmupSettings:
    """A phase before Skip2-LoRA in which ordinary LoRA is trained on every block."""

    skip2lora_warmup_steps: int = setting(0, COUNT)
    """Train ordinary LoRA on every block for this many steps first (besides train.epochs and max_steps), then freeze it with the blocks
    before the output layer. Slower to start, but a lower loss."""
    skip2lora_warmup_epochs: float = setting(0.0, FROM_0)
    """The same in epochs instead of steps, for example 0.5 or 1."""
    skip2lora_warmup_lr: Optional[float] = setting(None, ABOVE_0)
    """The learning rate of the warm-up. Default: the optimizer's."""

    def __post_init__(self) -> None:
        require_ranges(self)
        if self.skip2lora_warmup_steps and self.skip2lora_warmup_epochs:
            raise UserError("skip2lora_warmup_steps and skip2lora_warmup_epochs both set the length of the warm-up: give one of them")

    @property
    def has_warmup(self) -> bool:
        """True if LoRA is trained on every block first."""
        return bool(self.skip2lora_warmup_steps or self.skip2lora_warmup_epochs)

    def warmup_steps(self, per_epoch: int) -> int:
        """Return the number of warm-up steps, with `per_epoch` steps in an epoch."""
        return self.skip2lora_warmup_steps or math.ceil(self.skip2lora_warmup_epochs * per_epoch)


def model_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the adapters' fields of `litgpt.lora.Config` from the settings of a command, or of a hyperparameters.yaml."""
    names = {f.name for f in fields(AdapterSettings)} | {"skip2lora_warmup"}
    chosen = {key: value for key, value in settings.items() if key in names}
    if settings.get("skip2lora_positions") is not None:  # the older name
        chosen["skip2lora_block_indices"] = settings["skip2lora_positions"]
    if WarmupSettings(**{f.name: settings[f.name] for f in fields(WarmupSettings) if f.name in settings}).has_warmup:
        chosen["skip2lora_warmup"] = True
    return chosen


def scaling(rank: int, alpha: float, rslora: bool) -> float:
    """Return the factor of LoRA's product: alpha / r, with rsLoRA alpha / sqrt(r)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def readable_by_litgpt(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without the defaults that LitGPT's merge_lora rejects: it reads every lora_ key and knows only its own."""
    own = {
        f.name: f.default
        for f in fields(AdapterSettings)
        if f.name in ("lora_variant", "lora_rslora", "lora_rank_pattern", "lora_alpha_pattern", "lora_freeze_a", "lora_block_indices")
    }
    return {key: value for key, value in hyperparameters.items() if key not in own or value != own[key]}
