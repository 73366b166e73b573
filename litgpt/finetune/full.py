"""`litgpt finetune_full`: train every weight. Light, so that the command line answers before torch is loaded."""

from pathlib import Path
from typing import Any, Literal, Optional, Union

from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.errors import UserError


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/full"),
    precision: Optional[str] = None,
    devices: Union[int, str] = 1,
    num_nodes: int = 1,
    data: Optional[DataModule] = None,
    train: TrainArgs = TrainArgs(
        save_interval=1000, log_interval=1, global_batch_size=16, micro_batch_size=1, lr_warmup_steps=100, epochs=5, max_seq_length=None
    ),
    eval: EvalArgs = EvalArgs(interval=600, max_new_tokens=100, max_iters=100),
    log: LogArgs = LogArgs(),
    optimizer: Union[str, dict[str, Any]] = "AdamW",
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow", "litlogger"] = "csv",
    seed: int = 1337,
    access_token: Optional[str] = None,
    overwrite: bool = False,
    resume: Union[bool, Literal["auto"], Path] = False,
    dry_run: bool = False,
) -> None:
    """Fine-tune all weights of a model.

    Args:
        checkpoint_dir: The base model: a checkpoint folder, or a Hugging Face folder or GGUF file, converted on first use.
        out_dir: Folder for checkpoints and logs.
        precision: Number format: bf16-true, 32-true, bf16-mixed, 16-true, 16-mixed. Default: bf16-true where the processor has it,
            else 32-true.
        devices: How many devices to train on, or "auto".
        num_nodes: How many machines to train on.
        data: Training data, for example JSON, Alpaca2k or PythonDocs.
        train: How long to train, in what batches, and how the learning rate moves.
        eval: When and on how much to validate.
        log: Names and extras for remote loggers.
        optimizer: Name of a torch.optim class, or class_path and init_args.
        logger_name: A logger besides metrics.csv and TensorBoard, which are always written.
        seed: Random seed. The same seed gives the same curve on a CPU.
        access_token: Hugging Face token for gated data.
        overwrite: Replace an earlier run in out_dir.
        resume: Go on with the run in out_dir: true from its newest whole checkpoint, auto from there or anew if there is no run, or a
            step-* folder of it.
        dry_run: Check everything, show a sample with its loss mask, and estimate steps, memory and time. Writes nothing.
    """
    arguments = {**locals()}
    if data is None:
        raise UserError("no data: give --data JSON --data.json_path FILE, or another module of litgpt.data")

    from litgpt.convert.resolve import open_checkpoint
    from litgpt.train.methods import full
    from litgpt.train.rehearsal import dry_run as rehearse
    from litgpt.train.run import Job, run

    arguments["checkpoint_dir"] = open_checkpoint(checkpoint_dir, convert=not dry_run).resolve()

    (rehearse if dry_run else run)(Job.of(arguments), full(train.tie_embeddings))
