"""`litgpt finetune_adapter` and `finetune_adapter_v2`: LLaMA-Adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Optional

from litgpt.args import POSITIVE, Quantization, function_of, setting
from litgpt.finetune import Finetuning


@dataclass(kw_only=True)
class Adapter(Finetuning):
    """Fine-tune a model with LLaMA-Adapter: learned prompts that blocks attend to."""

    out_dir: Path = setting(Path("out/finetune/adapter"), may_change=True)
    quantize: Optional[Quantization] = None
    """Keep the frozen weights in 4 bits (bnb.nf4 and the like, by bitsandbytes) or 8 (int8, also named bnb.int8-training)."""
    adapter_prompt_length: int = setting(10, POSITIVE)
    """Positions of each block's prompt."""
    adapter_start_layer: int = 2
    """The first block with a prompt."""

    kind: ClassVar[str] = "prompts"
    module: ClassVar[str] = "litgpt.adapter"


@dataclass(kw_only=True)
class AdapterV2(Adapter):
    """Fine-tune a model with LLaMA-Adapter V2: learned prompts, a scale and a bias on every linear layer, and the norms."""

    out_dir: Path = setting(Path("out/finetune/adapter-v2"), may_change=True)

    module: ClassVar[str] = "litgpt.adapter_v2"


setup = function_of(Adapter, "checkpoint_dir", "out_dir", "precision", "quantize")
