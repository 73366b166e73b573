"""`litgpt sweep`: many settings of the adapters trained from one activation cache. Light, as `litgpt.finetune.lora` is."""

import inspect
from pathlib import Path
from typing import Any, Optional

from litgpt.args import EvalArgs, Grid
from litgpt.errors import UserError
from litgpt.finetune.lora import checked
from litgpt.finetune.lora import setup as finetune
from litgpt.train.grid import expand

NEW: dict[str, tuple[Any, Any, str]] = {
    "out_dir": (Path, Path("out/finetune/sweep"), "Folder for the results, sweep.csv and sweep.json, and a folder for each setting's run."),
    "eval": (EvalArgs, EvalArgs(interval=100, max_iters=100), "When and on how much to validate. A sweep generates no sample answers."),
    "overwrite": (bool, False, "Replace an earlier sweep in out_dir."),
    "resume": (
        inspect.signature(finetune).parameters["resume"].annotation,
        False,
        "auto: go on with the sweep in out_dir, if there is one. Finished settings are skipped, the one that was stopped is resumed.",
    ),
    "dry_run": (bool, False, "Check everything and list the settings, their steps and the cache's bytes. Writes nothing."),
    "grid": (
        Optional[Grid],
        None,
        "What is to vary, each key with a list of values: --grid.lora_r '[4, 8]' --grid.optimizer.lr '[5e-4, 1e-3]', or a mapping in a "
        "YAML file. All combinations are trained.",
    ),
    "samples": (Optional[int], None, "Train only so many of the combinations, drawn with the seed."),
}
"""Annotation, default and help of the arguments that `litgpt finetune` has not, or has otherwise."""


def setup(**arguments: Any) -> None:
    grid, samples = arguments.pop("grid"), arguments.pop("samples")
    arguments = checked(arguments)
    _require_shareable(arguments)
    arguments["resume"] = arguments["resume"] and "auto"
    variants = expand(arguments, grid, samples)

    from litgpt.convert.resolve import open_checkpoint
    from litgpt.train.sweep import dry_run, sweep

    base = open_checkpoint(arguments["checkpoint_dir"], convert=not arguments["dry_run"]).resolve()
    for settings in (arguments, *(variant.arguments for variant in variants if not variant.problem)):
        settings["checkpoint_dir"] = base
    (dry_run if arguments["dry_run"] else sweep)(arguments, variants)


def _like_finetune() -> None:
    """Give `setup` the signature and help of `litgpt finetune`, as `NEW` changes and completes them."""
    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = {name: inspect.Parameter(name, keyword, default=value, annotation=kind) for name, (kind, value, _) in NEW.items()}
    parameters = {**inspect.signature(finetune).parameters, **own}
    signature = inspect.Signature(list(parameters.values()), return_annotation=None)
    setup.__signature__ = signature  # type: ignore[attr-defined]
    setup.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    _, _, helps = inspect.cleandoc(finetune.__doc__ or "").partition("Args:")
    more = "".join(f"    {name}: {text}\n" for name, (_, _, text) in NEW.items())
    setup.__doc__ = f"Train many settings of LoRA or Skip2-LoRA from one activation cache.\n\nArgs:{helps.rstrip()}\n{more}"


_like_finetune()


def _require_shareable(arguments: dict[str, Any]) -> None:
    """Raises UserError for arguments with which activations cannot be shared, or a sweep makes no sense."""
    if arguments["skip2lora_cache"] == "off":
        raise UserError("skip2lora_cache is off: the settings of a sweep are trained from one cache. Leave it out, or give memory or disk")
    if key := next((key for key in ("skip2lora_warmup_steps", "skip2lora_warmup_epochs") if arguments[key]), None):
        raise UserError(
            f"{key}: a warm-up changes what the frozen blocks compute, for each setting anew, so nothing could be shared. "
            "Train LoRA alone once (litgpt finetune, --max_steps) and sweep from its final folder as checkpoint_dir, which has it merged"
        )
    if str(arguments["devices"]) != "1" or arguments["num_nodes"] != 1:
        raise UserError("devices, num_nodes: a sweep trains its settings one after the other on one device: leave them out")
    if str(arguments["resume"]) not in ("True", "False", "auto"):
        raise UserError(f"resume is {arguments['resume']}: a sweep is gone on with by --resume auto, in its out_dir")
