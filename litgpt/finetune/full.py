"""`litgpt finetune_full`: train every weight."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from litgpt.args import EvalArgs, function_of, setting
from litgpt.finetune import Finetuning

if TYPE_CHECKING:
    from litgpt.train.methods import Method


@dataclass(kw_only=True)
class Full(Finetuning):
    """Fine-tune all weights of a model."""

    trains_base: ClassVar[bool] = True

    out_dir: Path = setting(Path("out/finetune/full"), may_change=True)
    eval: EvalArgs = setting(EvalArgs(max_new_tokens=100))

    def method(self) -> "Method":
        from litgpt.train.methods import full

        return full(self.train.tie_embeddings)


setup = function_of(Full, "checkpoint_dir", "out_dir", "precision", "devices")
