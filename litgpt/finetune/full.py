"""`litgpt finetune_full`: train every weight."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from litgpt.args import EvalArgs, setting
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


def setup(checkpoint_dir: Path | str, **settings: Any) -> None:
    """Fine-tune a model with these settings, the fields of `Full`."""
    Full(checkpoint_dir=Path(checkpoint_dir), **settings).main()
