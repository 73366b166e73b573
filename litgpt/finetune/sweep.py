"""`litgpt sweep`: many settings of the adapters trained from one activation cache."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Optional

from litgpt.args import POSITIVE, EvalArgs, Grid, setting
from litgpt.errors import UserError
from litgpt.finetune.lora import Lora
from litgpt.train.settings import Resume


@dataclass(kw_only=True)
class Sweep(Lora):
    """Train many settings of LoRA or Skip2-LoRA from one activation cache. Without a config file, settings that are not given follow from
    the data and the model, as those of `litgpt finetune` do."""

    follows_data: ClassVar[bool] = True

    out_dir: Path = setting(Path("out/finetune/sweep"), may_change=True)
    """Folder for the results, sweep.csv and sweep.json, and a folder for each trial."""
    eval: EvalArgs = setting(EvalArgs(interval=100, initial_validation=True))
    """When to validate, and on how many batches. A sweep generates no sample answers."""
    overwrite: bool = setting(False, may_change=True)
    """Replace an earlier sweep in out_dir."""
    resume: Resume = setting(False, may_change=True)
    """auto: resume the sweep in out_dir, if there is one. Finished trials are skipped; the trial that was stopped is resumed."""
    dry_run: bool = setting(False, may_change=True)
    """Check everything and list the trials, their steps and the cache's bytes. Writes nothing."""
    grid: Optional[Grid] = None
    """The values to try for each key: --grid.lora_r '[4, 8]' --grid.optimizer.lr '[5e-4, 1e-3]', or a mapping in a YAML file. All
    combinations are trained. Without a config file the default is three learning rates."""
    samples: Optional[int] = setting(None, POSITIVE)
    """Train only this many of the combinations, drawn with the seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip2lora_cache == "off":
            raise UserError("skip2lora_cache is off: the trials of a sweep share one cache. Leave it out, or give memory or disk")
        if key := next((key for key in ("neftune_noise_alpha", "word_dropout") if getattr(self.train, key)), None):
            raise UserError(f"train.{key}: what it changes is drawn anew for each batch, so the trials could share nothing: leave it out")
        if key := next((key for key in ("skip2lora_warmup_steps", "skip2lora_warmup_epochs") if getattr(self, key)), None):
            raise UserError(
                f"{key}: a warm-up changes the frozen blocks' outputs in each trial, so nothing could be shared. "
                "Train LoRA alone once (litgpt finetune, --max_steps) and sweep from its final folder as checkpoint_dir: it has LoRA merged"
            )
        if str(self.resume) not in ("True", "False", "auto"):
            raise UserError(f"resume is {self.resume}: a sweep is resumed by --resume auto, in its out_dir")
        self.resume = self.resume and "auto"

    def main(self) -> None:
        from litgpt.train.sweep import sweep

        sweep(Lora(**{item.name: getattr(self, item.name) for item in fields(Lora)}), self.grid, self.samples)
