"""`litgpt finetune` (`finetune_lora`): LoRA and Skip2-LoRA. Light, so that the command line answers before torch is loaded."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from litgpt.adapters.settings import AdapterSettings, WarmupSettings
from litgpt.args import Quantization, setting
from litgpt.errors import UserError
from litgpt.objectives.settings import ObjectiveSettings
from litgpt.train.settings import Run

if TYPE_CHECKING:
    from litgpt.train.methods import Method


@dataclass(kw_only=True)
class Lora(WarmupSettings, AdapterSettings, ObjectiveSettings, Run):  # fields come in the order from Run to WarmupSettings
    """Fine-tune a model with LoRA or Skip2-LoRA."""

    out_dir: Path = setting(Path("out/finetune/lora"), may_change=True)
    """Folder for checkpoints and logs."""
    quantize: Optional[Quantization] = None
    """Keep the frozen weights in 4 bits (bnb.nf4 and the like, by bitsandbytes) or 8 (int8, also named bnb.int8-training)."""
    lora_r: int = setting(8, varies=True)
    """Rank of the adapters."""
    lora_alpha: int = setting(16, varies=True)
    """Adapters are scaled by lora_alpha / lora_r."""
    lora_dropout: float = setting(0.05, varies=True)
    """Dropout on the adapters' input."""
    lora_query: bool = setting(True, varies=True)
    """LoRA on the query projections."""
    lora_value: bool = setting(True, varies=True)
    """LoRA on the value projections."""
    loraplus_lr_ratio: float = setting(1.0, varies=True)
    """The learning rate of B as a multiple of A's (LoRA+): 16 for example, with a lower rate."""
    skip2lora_cache: Literal["auto", "memory", "disk", "off"] = setting("auto", may_change=True)
    """Where the frozen blocks' activations are kept for the epochs after the first: memory, disk, off, or auto (memory if they fit half of
    what is free, else disk)."""
    skip2lora_cache_dir: Optional[Path] = setting(None, may_change=True)
    """Folder for caches on disk. Default: activation_cache beside out_dir."""
    skip2lora_cache_dtype: Optional[str] = None
    """bfloat16, float16 or float32. Default: the backbone's, which loses nothing."""

    def __post_init__(self) -> None:
        Run.__post_init__(self)
        ObjectiveSettings.__post_init__(self)
        if self.skip2lora_cache_dir is not None:
            self.skip2lora_cache_dir = Path(self.skip2lora_cache_dir)
        AdapterSettings.__post_init__(self)
        WarmupSettings.__post_init__(self)
        self.require_adapters(self)
        self._require_fitting_heads()
        if not 0 < self.loraplus_lr_ratio < math.inf:
            raise UserError(f"loraplus_lr_ratio is {self.loraplus_lr_ratio}: a number above 0 is needed")
        if self.train.tie_embeddings is not None:
            raise UserError("train.tie_embeddings is for finetune_full: adapters leave the embedding as it is")

    def _require_fitting_heads(self) -> None:
        """Give a critic its head. Raise UserError for heads that the objective does not train, and adapters that a critic would change."""
        if self.mtp_heads and self.objective != "next_token":
            raise UserError(f"mtp_heads are not trained by objective {self.objective}: leave one of them out")
        if self.objective == "critic":
            self.value_head = self.value_head or "linear"
            if self.changes_text:
                raise UserError(
                    "objective critic trains the value head alone, on a frozen model: set lora_query, lora_value, ... and "
                    "skip2lora_enabled to false, and leave modules_to_save out. The critic of a tuned model takes its merged folder as "
                    "checkpoint_dir"
                )
        elif self.value_head:
            raise UserError(f"value_head is not trained by objective {self.objective}: set objective to critic, or leave value_head out")

    def method(self) -> "Method":
        from litgpt.train.methods import adapters

        return adapters(self)

    def main(self) -> None:
        from litgpt.train.run import run

        run(self, self.method())


@dataclass(kw_only=True)
class Finetune(Lora):
    """Fine-tune a model with LoRA or Skip2-LoRA. Without a config file, settings that are not given follow from the data and the model."""

    @staticmethod
    def complete(given: dict[str, Any]) -> dict[str, Any]:
        """Return the settings with those that are missing (`litgpt.train.recipe`)."""
        from litgpt.train.recipe import complete

        return complete(given)


def setup(checkpoint_dir: Path | str, **settings: Any) -> None:
    """Fine-tune a model with these settings, the fields of `Lora`."""
    Lora(checkpoint_dir=Path(checkpoint_dir), **settings).main()
