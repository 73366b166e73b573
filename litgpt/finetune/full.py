"""`litgpt finetune_full`: train every weight."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.args import EvalArgs, function_of, setting
from litgpt.finetune import Finetuning
from litgpt.train.settings import WholeRun


@dataclass(kw_only=True)
class Full(WholeRun, Finetuning):
    """Fine-tune all weights of a model."""

    out_dir: Path = setting(Path("out/finetune/full"), may_change=True)
    eval: EvalArgs = setting(EvalArgs(max_new_tokens=100))


setup = function_of(Full, "checkpoint_dir", "out_dir", "precision", "devices")
