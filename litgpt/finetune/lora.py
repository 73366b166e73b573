"""`litgpt finetune` (`finetune_lora`): LoRA and Skip2-LoRA. Light, so that the command line answers before torch is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

from litgpt.args import EvalArgs, LogArgs, Quantization, TrainArgs
from litgpt.data import DataModule
from litgpt.errors import UserError

if TYPE_CHECKING:
    from litgpt.train.methods import Method
    from litgpt.train.run import Job

BlockIndices = Optional[Union[int, list[Union[int, str]], str]]
LORA_FLAGS = ("lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp", "lora_head")


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/lora"),
    precision: Optional[str] = None,
    quantize: Optional[Quantization] = None,
    devices: Union[int, str] = 1,
    num_nodes: int = 1,
    lora_r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.05,
    lora_variant: Literal["lora", "dora"] = "lora",
    lora_rslora: bool = False,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    lora_block_indices: BlockIndices = None,
    skip2lora_enabled: bool = False,
    skip2lora_block_indices: BlockIndices = None,
    skip2lora_positions: BlockIndices = None,
    skip2lora_output_layer: str = "lm_head",
    skip2lora_norm: Literal["rms", "none"] = "rms",
    skip2lora_r: Optional[int] = None,
    skip2lora_alpha: Optional[int] = None,
    skip2lora_dropout: Optional[float] = None,
    skip2lora_warmup_steps: int = 0,
    skip2lora_warmup_epochs: float = 0.0,
    skip2lora_warmup_lr: Optional[float] = None,
    skip2lora_cache: Literal["auto", "memory", "disk", "off"] = "auto",
    skip2lora_cache_dir: Optional[Path] = None,
    skip2lora_cache_dtype: Optional[str] = None,
    data: Optional[DataModule] = None,
    train: TrainArgs = TrainArgs(
        save_interval=1000, log_interval=1, global_batch_size=16, micro_batch_size=1, lr_warmup_steps=100, epochs=5, max_seq_length=None
    ),
    log: LogArgs = LogArgs(),
    eval: EvalArgs = EvalArgs(interval=100, max_new_tokens=100, max_iters=100),
    optimizer: Union[str, dict[str, Any]] = "AdamW",
    logger_name: Literal["csv", "tensorboard", "wandb", "mlflow", "litlogger"] = "csv",
    seed: int = 1337,
    access_token: Optional[str] = None,
    overwrite: bool = False,
    resume: Union[bool, Literal["auto"], Path] = False,
    dry_run: bool = False,
) -> None:
    """Fine-tune a model with LoRA or Skip2-LoRA.

    Args:
        checkpoint_dir: The base model: a checkpoint folder, or a Hugging Face folder or GGUF file, converted on first use.
        out_dir: Folder for checkpoints and logs.
        precision: Number format: bf16-true, 32-true, bf16-mixed, 16-true, 16-mixed. Default: bf16-true where the processor has it,
            else 32-true.
        quantize: Keep the frozen weights in 4 bits (bnb.nf4 and the like, by bitsandbytes) or 8 (int8, also named bnb.int8-training).
        devices: How many devices to train on, or "auto".
        num_nodes: How many machines to train on.
        lora_r: Rank of the adapters.
        lora_alpha: Adapters are scaled by lora_alpha / lora_r.
        lora_dropout: Dropout on the adapters' input.
        lora_variant: lora, or dora: weight-decomposed LoRA, which also learns the length of each row of a weight.
        lora_rslora: Scale LoRA by lora_alpha / sqrt(lora_r) (rsLoRA), which suits high ranks.
        lora_query: LoRA on the query projections.
        lora_key: LoRA on the key projections.
        lora_value: LoRA on the value projections.
        lora_projection: LoRA on attention's output projections.
        lora_mlp: LoRA on the MLPs' layers.
        lora_head: LoRA on the output head.
        lora_block_indices: Blocks that get LoRA, in the forms of skip2lora_block_indices. What lies before the first of them runs
            frozen and is cached. Default: all.
        skip2lora_enabled: Train Skip2-LoRA adapters, from blocks' outputs straight to the output layer. LoRA then applies behind it only.
        skip2lora_block_indices: Blocks to tap: [0, 1, -1], all, last:6, every:5 or names such as transformer.h.3. auto:6 (or auto) has 6
            chosen before training, from what all blocks give for a sample of the training data. Default: the last 6.
        skip2lora_positions: Older name of skip2lora_block_indices.
        skip2lora_output_layer: The layer whose input the adapters' sum joins: lm_head, transformer.ln_f or transformer.h.M.
        skip2lora_norm: rms divides a block's output by its root mean square before its adapter, none does not.
        skip2lora_r: Rank of the Skip2-LoRA adapters. Default: lora_r.
        skip2lora_alpha: Their alpha. Default: lora_alpha.
        skip2lora_dropout: Their dropout. Default: lora_dropout.
        skip2lora_warmup_steps: Train ordinary LoRA on every block for this many steps first (besides train.epochs and max_steps), then
            freeze it with the blocks before the output layer. Slower to start, better.
        skip2lora_warmup_epochs: The same in epochs, 0.5 or 1 for example, in place of steps.
        skip2lora_warmup_lr: The learning rate of the warm-up. Default: the optimizer's.
        skip2lora_cache: Where the frozen blocks' activations are kept for the epochs after the first: memory, disk, off, or auto (memory if
            they fit half of what is free, else disk).
        skip2lora_cache_dir: Folder for caches on disk. Default: activation_cache beside out_dir.
        skip2lora_cache_dtype: bfloat16, float16 or float32. Default: the backbone's, which loses nothing.
        data: Training data, for example JSON, Alpaca2k or PythonDocs.
        train: How long to train, in what batches, and how the learning rate moves.
        log: Names and extras for remote loggers.
        eval: When and on how much to validate.
        optimizer: Name of a torch.optim class, or class_path and init_args.
        logger_name: A logger besides metrics.csv and TensorBoard, which are always written.
        seed: Random seed. The same seed gives the same curve on a CPU.
        access_token: Hugging Face token for gated data.
        overwrite: Replace an earlier run in out_dir.
        resume: Go on with the run in out_dir: true from its newest whole checkpoint, auto from there or anew if there is no run, or a
            step-* folder of it.
        dry_run: Check everything, show a sample with its loss mask, and estimate steps, memory and time. Writes nothing.
    """
    arguments = checked({**locals()})

    from litgpt.convert.resolve import open_checkpoint
    from litgpt.train.rehearsal import dry_run as rehearse
    from litgpt.train.run import run

    arguments["checkpoint_dir"] = open_checkpoint(checkpoint_dir, convert=not dry_run).resolve()
    (rehearse if dry_run else run)(*job_of(arguments))


def checked(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `setup` under their newer names. Raises UserError for those that are missing or have no place here."""
    arguments = {**arguments}
    positions = arguments.pop("skip2lora_positions")
    if positions is not None:
        if arguments["skip2lora_block_indices"] is not None:
            raise UserError("skip2lora_positions is the older name of skip2lora_block_indices: give one of them")
        arguments["skip2lora_block_indices"] = positions
    if arguments["train"].tie_embeddings is not None:
        raise UserError("train.tie_embeddings is for finetune_full: adapters leave the embedding as it is")
    if arguments["data"] is None:
        raise UserError("no data: give --data JSON --data.json_path FILE, or another module of litgpt.data")
    return arguments


def job_of(arguments: dict[str, Any]) -> tuple["Job", "Method"]:
    """What `checked` arguments, their checkpoint opened, ask for."""
    from litgpt.train.methods import adapters
    from litgpt.train.run import Job

    job = Job.of(
        arguments,
        notes=[flag for flag in LORA_FLAGS if arguments[flag]],
        cache_mode=arguments["skip2lora_cache"],
        cache_dir=arguments["skip2lora_cache_dir"],
        cache_dtype=arguments["skip2lora_cache_dtype"],
    )
    return job, adapters(arguments, arguments["quantize"])
