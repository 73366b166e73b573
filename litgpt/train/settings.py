"""The settings that every training command has. Light, so that the command line answers before torch is loaded."""

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Optional, Union

from litgpt.args import SECRET, Accelerator, EvalArgs, LogArgs, TrainArgs, as_config, require_seed, setting
from litgpt.data.alpaca import DEFAULT, Alpaca
from litgpt.data.base import DataModule
from litgpt.errors import UserError
from litgpt.files import expand_path

Resume = Union[bool, Literal["auto"], Path]


@dataclass(kw_only=True)
class Run:
    """The settings that every training command has."""

    kind: ClassVar[str] = "full"  # the function of `litgpt.train.methods` that makes the method of the command
    needs_data: ClassVar[bool] = False  # True: there is no default
    follows_data: ClassVar[bool] = False  # True: without a config file, `litgpt.train.recipe` chooses what is not given

    checkpoint_dir: Path = field(metadata={"may_change": True})
    """The base model: a checkpoint folder, or a Hugging Face folder or GGUF file, converted on first use."""
    out_dir: Path = setting(Path("out/finetune"), may_change=True)
    """Folder for checkpoints and logs."""
    precision: Optional[str] = setting(None, may_change=True)
    """Number format: bf16-true, 32-true, bf16-mixed, 16-true, 16-mixed. Default: bf16-true where the device computes it, else 32-true."""
    accelerator: Accelerator = setting("auto", may_change=True)
    """Device to train on. auto: the first GPU that works, else the CPU."""
    devices: Union[int, str] = setting(1, may_change=True)
    """Number of devices per machine to train on, or "auto". With torchrun or srun, the processes that they start are used."""
    num_nodes: int = setting(1, may_change=True)
    """Number of machines to train on."""
    strategy: Literal["auto", "ddp", "fsdp"] = setting("auto", may_change=True)
    """ddp: each process has a copy of the model. fsdp: each has a part of it. auto: ddp if a copy fits, else fsdp."""
    cpu_offload: bool = setting(False, may_change=True)
    """With fsdp, keep each process's part of the model, its gradients and its optimizer state in CPU memory instead of on the GPU."""
    timeout: float = setting(1800.0, may_change=True)
    """Seconds that processes wait for each other before they end the run."""
    data: Optional[DataModule] = setting(None, may_change=True)
    """Training data: a file or folder, or a data set such as Alpaca2k, Dolly or PythonDocs. Default: Alpaca."""
    train: TrainArgs = setting(TrainArgs(micro_batch_size=1))
    """How long to train, in what batches, and how the learning rate moves."""
    eval: EvalArgs = setting(EvalArgs(interval=100, max_new_tokens=100))
    """When to validate, and on how many batches."""
    log: LogArgs = setting(LogArgs(), may_change=True)
    """Names and extras for remote loggers."""
    optimizer: Union[str, dict[str, Any]] = setting("AdamW", varies=True)
    """Name of a torch.optim class, or class_path and init_args."""
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow", "litlogger"] = setting("csv", may_change=True)
    """A logger besides metrics.csv and TensorBoard, which are always written."""
    seed: int = setting(1337, varies=True)
    """Random seed. The same seed gives the same curve on a CPU."""
    access_token: Optional[str] = setting(None, may_change=True)
    """Hugging Face token for gated data."""
    overwrite: bool = setting(False, may_change=True)
    """Replace an earlier run in out_dir."""
    resume: Resume = setting(False, may_change=True)
    """Resume the run in out_dir. true: from its newest complete checkpoint; auto: the same, or start a new run if there is none; or the
    step-* folder to resume from."""
    verbose: bool = setting(False, may_change=True)
    """Also say what is trained, what runs frozen, and what caches need."""
    dry_run: bool = setting(False, may_change=True)
    """Check everything, show a sample with its loss mask, and estimate steps, memory and time. Writes nothing."""

    @property
    def wants_shards(self) -> bool:
        """True if the settings request a sharded model; strategy auto may choose one without that."""
        return self.strategy == "fsdp" or self.cpu_offload

    def chat_with(self, folder: Path) -> tuple[str, str]:
        """Return the command that talks to a model of this run, and what it does. Facts are asked for without chance."""
        command, train = f"litgpt chat {shlex.quote(str(folder))}", self.train
        if self.eval.target_loss is None and not train.follow_ups:
            return command, "talk to it"
        return f"{command} --temperature 0", "ask it" if train.follow_ups else "ask it; /reset before each new question"

    def __post_init__(self) -> None:
        self.checkpoint_dir, self.out_dir = expand_path(self.checkpoint_dir), expand_path(self.out_dir)
        if isinstance(self.resume, str) and self.resume != "auto":
            self.resume = expand_path(self.resume)
        require_seed(self.seed)
        if self.data is None and self.needs_data:
            raise UserError("no data: give --data FILE, or the name of a module of litgpt.data, such as TextFiles")
        if self.data is None:
            self.data = Alpaca()
            if os.environ.get("RANK", "0") == "0":
                print(DEFAULT, file=sys.stderr)
        if self.access_token and getattr(self.data, SECRET, "") is None:
            setattr(self.data, SECRET, self.access_token)

    def method(self) -> Any:
        """Return the `litgpt.train.methods.Method` of the command."""
        from litgpt.train import methods

        return getattr(methods, self.kind)(self)

    def hyperparameters(self) -> dict[str, Any]:
        """Return the settings as YAML values for `hyperparameters.yaml`, with which `--config` repeats the run."""
        return as_config({**vars(self), "resume": False, "overwrite": False})


@dataclass(kw_only=True)
class WholeRun(Run):
    """The settings of commands that train all weights."""

    compile: bool = setting(False, may_change=True)
    """Compile the blocks (torch.compile), which takes half a minute and a C++ compiler: a step then takes a seventh less time on a CPU."""
