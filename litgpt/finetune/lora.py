"""`litgpt finetune` (`finetune_lora`): LoRA and Skip2-LoRA."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Optional, get_args

from litgpt.adapters.settings import DROPOUT, RANK, AdapterSettings, WarmupSettings
from litgpt.args import ABOVE_0, Quantization, Range, function_of, setting
from litgpt.errors import UserError
from litgpt.files import expand_path
from litgpt.finetune import Finetuning
from litgpt.objectives.settings import Rating

# groups of parameters that may have their own learning rate -> the text that their names contain
RATE_GROUPS = {"lora": ".lora_", "skip2lora": "skip2lora.", **{name: name for name in ("value_head", "mtp_heads", "wte", "lm_head")}}


@dataclass(kw_only=True)
class Lora(WarmupSettings, AdapterSettings, Finetuning):  # fields come in the order from Run to WarmupSettings
    """Fine-tune a model with LoRA or Skip2-LoRA."""

    kind: ClassVar[str] = "adapters"

    out_dir: Path = setting(Path("out/finetune/lora"), may_change=True)
    quantize: Optional[Quantization] = None
    """Keep the frozen weights in 4 bits (bnb.nf4 and the like, by bitsandbytes) or 8 (int8, also named bnb.int8-training)."""
    lora_r: int = setting(8, RANK, varies=True)
    lora_alpha: int = setting(16, Range(), varies=True)
    lora_dropout: float = setting(0.05, DROPOUT, varies=True)
    lora_query: bool = setting(True, varies=True)
    lora_value: bool = setting(True, varies=True)
    loraplus_lr_ratio: float = setting(1.0, ABOVE_0, varies=True)
    """The learning rate of B as a multiple of A's (LoRA+): 16 for example, with a lower rate."""
    lr_ratios: Optional[dict[str, float]] = setting(None, varies=True)
    """Groups of parameters with their own learning rates, as multiples of the optimizer's: lora, skip2lora, value_head, mtp_heads, wte
    and lm_head. --lr_ratios.value_head 10 for example."""
    skip2lora_cache: Literal["auto", "memory", "disk", "off"] = setting("auto", may_change=True)
    """Where the frozen blocks' activations are kept for the epochs after the first: memory, disk, off, or auto (memory if they fit into
    half of the free memory, else disk)."""
    skip2lora_cache_dir: Optional[Path] = setting(None, may_change=True)
    """Folder for caches on disk. Default: activation_cache beside out_dir."""
    skip2lora_cache_dtype: Optional[str] = None
    """bfloat16, float16 or float32. Default: the backbone's, which is lossless."""

    def __post_init__(self) -> None:
        Finetuning.__post_init__(self)
        if self.skip2lora_cache_dir is not None:
            self.skip2lora_cache_dir = expand_path(self.skip2lora_cache_dir)
        AdapterSettings.__post_init__(self)
        WarmupSettings.__post_init__(self)
        if self.has_warmup:
            self.require_warmup("skip2lora_warmup_steps" if self.skip2lora_warmup_steps else "skip2lora_warmup_epochs")
        self._require_fitting_heads()
        self._require_rates()

    def _require_rates(self) -> None:
        """Raise UserError for a factor that is not a number above 0, and for a group of parameters that is not trained."""
        trained = [*self.heads, *(self.modules_to_save or ())]
        trained += ["lora"] if self.has_lora_in_blocks or (self.lora_r > 0 and self.lora_head) else []
        trained += ["skip2lora"] if self.skip2lora_enabled else []
        groups = [group for group in RATE_GROUPS if group in trained]
        for group, ratio in (self.lr_ratios or {}).items():
            if group not in groups:
                raise UserError(f"lr_ratios names {group}, which is not trained: these settings train {', '.join(groups)}")
            if not ABOVE_0.holds(ratio):
                raise UserError(f"lr_ratios.{group} is {ratio!r}: {ABOVE_0} is needed")

    def lr_ratio_of(self, name: str) -> float:
        """Return the learning rate of a parameter as a multiple of the optimizer's."""
        group = next((group for group in ("skip2lora", *RATE_GROUPS) if RATE_GROUPS[group] in name), "")
        own = (self.lr_ratios or {}).get(group, 1.0)
        return own * self.loraplus_lr_ratio if name.endswith("lora_B") else own

    def _require_fitting_heads(self) -> None:
        """Give an objective of values its head. Raise UserError for heads and adapters that do not fit the objective."""
        if self.mtp_heads and self.objective not in ("next_token", "verifiable"):
            raise UserError(f"mtp_heads are not trained by objective {self.objective}: leave one of them out")
        if self.mtp_taps and self.has_warmup:
            raise UserError("mtp_taps does not work with a warm-up, in which the blocks' outputs change: leave one of them out")
        if self.objective not in get_args(Rating):
            if self.value_head:
                raise UserError(
                    f"value_head is not trained by objective {self.objective}: set objective to critic or verifiable, or leave the head out"
                )
            return
        self.value_head = self.value_head or "linear"
        if self.objective == "critic" and self.changes_text:
            raise UserError(
                "objective critic trains the value head alone, on a frozen model: set lora_query, lora_value, ... and skip2lora_enabled to "
                "false, and leave modules_to_save out. The critic of a tuned model takes its merged folder as checkpoint_dir"
            )
        if self.objective == "verifiable" and not self.changes_text:
            raise UserError(
                "objective verifiable trains adapters alongside the value head: set lora_r and lora_query, lora_value, ... or "
                "skip2lora_enabled, or take objective critic"
            )


@dataclass(kw_only=True)
class Finetune(Lora):
    """Fine-tune a model with LoRA or Skip2-LoRA. Without a config file, settings that are not given follow from the data and the model."""

    follows_data: ClassVar[bool] = True


setup = function_of(Lora, "checkpoint_dir", "out_dir", "precision", "quantize")
