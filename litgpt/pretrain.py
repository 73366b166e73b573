"""`litgpt pretrain`: train all weights of a model on running text, from scratch or from a checkpoint. Light, so that the command line
answers before torch is loaded."""

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Optional, Union

from litgpt import families
from litgpt.args import EvalArgs, TrainArgs, function_of, setting
from litgpt.atomic import locked, new_folder, write_text
from litgpt.checkpoint import copy_tokenizer_files, require_checkpoint, save_config, save_weights, tokenizer_contents
from litgpt.convert.resolve import locate, open_checkpoint
from litgpt.data.text_files import Text
from litgpt.errors import UserError
from litgpt.files import expand_path
from litgpt.prompts import PromptStyle, save_prompt_style
from litgpt.train.settings import WholeRun

if TYPE_CHECKING:
    from litgpt.lora import GPT, Config as LoRAConfig

INITIAL = "initial"  # folder in out_dir with the fresh weights that a run from scratch starts from
RECORD = "initial.json"


@dataclass(kw_only=True)
class Pretrain(WholeRun):
    """Train all weights of a model on running text."""

    needs_data: ClassVar[bool] = True
    first: ClassVar[str] = "model_name"  # may stand without its key on the command line

    checkpoint_dir: Path = field(default=Path(), init=False)
    model_name: Optional[str] = None
    """A named model, such as pythia-14m, whose config a new model gets; or "list", which prints the names."""
    model_config: Optional[dict[str, Any]] = None
    """Fields of the model's config: those that differ from model_name's (--model_config.n_layer 4), or all of them, with a name of their
    own; model_name is not read then."""
    out_dir: Path = setting(Path("out/pretrain"), may_change=True)
    initial_checkpoint_dir: Optional[Path] = setting(None, may_change=True, older_names=("initial_checkpoint",))
    """Start from the weights of this checkpoint (continued pretraining)."""
    tokenizer_dir: Optional[Path] = setting(None, may_change=True)
    """The folder with the tokenizer. Default: initial_checkpoint_dir."""
    train: TrainArgs = setting(
        TrainArgs(global_batch_size=512, epochs=None, max_tokens=int(3e12), max_norm=1.0, min_lr=4e-5, lr_warmup_steps=2000)
    )
    eval: EvalArgs = setting(EvalArgs(interval=1000))
    devices: Union[int, str] = setting("auto", may_change=True)
    """Number of devices to train on, or "auto"."""
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow", "litlogger"] = setting("tensorboard", may_change=True)
    seed: int = setting(42, varies=True)
    """Random seed, also of the initial weights."""

    def __post_init__(self) -> None:
        if base_dict := getattr(self.model_config, "base_dict", None):  # a `Config`, in Python
            self.model_config = base_dict()
        if self.model_name != "list":
            super().__post_init__()
            if self.initial_checkpoint_dir is None:
                if self.model_name is None and self.model_config is None:
                    raise UserError(
                        "there is no model to train: give model_name (`litgpt pretrain list` prints the names), or initial_checkpoint_dir"
                    )
                if self.tokenizer_dir is None:
                    raise UserError("tokenizer_dir is missing: name a folder with tokenizer.json, such as a downloaded model's")

    def hyperparameters(self) -> dict[str, Any]:
        return {key: value for key, value in super().hyperparameters().items() if key != "checkpoint_dir"}

    def main(self) -> None:
        if self.model_name == "list":
            print("\n".join(families.names()))
            return
        from litgpt.train.run import run

        with self._base() as folder:
            self.checkpoint_dir = folder
            run(self, self.method())

    @contextmanager
    def _base(self) -> Iterator[Path]:
        """Yield the checkpoint folder to start from: the one named, or one with fresh weights in out_dir."""
        if self.initial_checkpoint_dir is not None:
            yield self._initial(self.initial_checkpoint_dir)
        elif self.dry_run:
            with tempfile.TemporaryDirectory() as folder:
                yield self._made(Path(folder) / INITIAL)
        else:
            is_new = not self.out_dir.exists()
            try:
                with locked(self.out_dir / f".{INITIAL}"):  # several processes may start at once
                    folder_in_run = self._made(self.out_dir / INITIAL)
            finally:
                with suppress(OSError):  # another process was first, or is waiting; a refused run leaves no folder
                    (self.out_dir / f".{INITIAL}").rmdir()
                    if is_new:
                        self.out_dir.rmdir()
            yield folder_in_run

    def _initial(self, checkpoint_dir: Path) -> Path:
        """Return the folder of the checkpoint to start from. Raise UserError if it holds another model than the one that is named."""
        from litgpt.lora import Config

        named = self.model_config or {}
        config = None if self.model_name is None or "name" in named else Config.from_name(self.model_name)
        if config:
            named = {"name": config.name, **named}
        if not named:  # the run opens it
            return checkpoint_dir
        folder = require_checkpoint(open_checkpoint(checkpoint_dir, convert=not self.dry_run))
        own = Config.from_checkpoint(folder)
        if config and {**config.base_dict(), "name": own.name, "hf_config": own.hf_config} == own.base_dict():
            named["name"] = own.name  # the same architecture, as of a base model and its instruct model
        for key, value in named.items():
            if value != getattr(own, key, None):
                raise UserError(
                    f"initial_checkpoint_dir {folder} holds a model with {key} {getattr(own, key, None)!r}, and the command names "
                    f"{value!r}: leave model_name and model_config out, or initial_checkpoint_dir to start from fresh weights"
                )
        return folder

    def _made(self, folder: Path) -> Path:
        """Return the folder with the fresh weights and the tokenizer, creating them if needed."""
        from litgpt.lora import Config
        from litgpt.train.rehearsal import require_data

        changes = self.model_config or {}
        is_whole = self.model_name is None or "name" in changes
        config = Config(**changes) if is_whole else Config.from_name(str(self.model_name), **changes)
        record = {"config": config.base_dict(), "seed": self.seed}
        text = json.dumps(record, sort_keys=True, default=str)
        assert self.tokenizer_dir is not None
        source = locate(expand_path(self.tokenizer_dir))
        is_made = (folder / RECORD).is_file() and (folder / RECORD).read_text(encoding="utf-8") == text
        if is_made and tokenizer_contents(folder) == tokenizer_contents(source):
            return folder
        if self.dry_run:
            require_data(self)
        elif self.data is not None:
            self.data.prepare_data()
        if isinstance(self.data, Text):  # before weights, which may take minutes and gigabytes
            self.data.check()
        model = fresh(config, self.seed)
        with new_folder(folder, overwrite=(folder / RECORD).is_file()) as new:
            save_weights(model.state_dict(), new / "lit_model.pth")
            save_config(config, new)
            copy_tokenizer_files(source, new)
            save_prompt_style(PromptStyle.from_name("default"), new)
            write_text(new / RECORD, text)
        return folder


def fresh(config: "LoRAConfig", seed: int) -> "GPT":
    """Return a model with random weights, fp32.

    Weights of linear layers and embeddings are drawn from N(0, 2 / (5 d)), d = `n_embd` (GPT-NeoX-20B, arXiv 2204.06745); those that write
    to the residual stream, the `proj` of attention and MLPs, from N(0, 1 / (d L^2)), L = `n_layer`. Biases are 0, norms the identity.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    model = config.make_model()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            is_output = name.endswith(".proj")
            deviation = 1 / math.sqrt(config.n_embd) / config.n_layer if is_output else math.sqrt(2 / 5 / config.n_embd)
            torch.nn.init.normal_(module.weight, 0.0, deviation, generator=generator)
            if getattr(module, "bias", None) is not None:
                torch.nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return model


setup = function_of(Pretrain, "model_name", "model_config", "out_dir", "precision", "initial_checkpoint_dir", "resume", "data")
