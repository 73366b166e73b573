"""How the processes of a run share the model: a copy for each (ddp), or a part (fsdp)."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

import psutil
import torch

from litgpt import checkpoint
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.lora import Config as LoRAConfig
from litgpt.memory import PROCESS, estimate
from litgpt.objectives.named import objective_of
from litgpt.sample import Sample
from litgpt.text import gib
from litgpt.train.methods import Method
from litgpt.train.parallel import Rank
from litgpt.train.settings import Run

OF_WHOLE_TENSORS = ("Adafactor", "Muon")  # optimizers whose update of a number looks at others of its tensor


def obstacles(settings: Run, method: Method, base: Path) -> list[str]:
    """Return the settings that do not work with a sharded model."""
    optimizer: Any = settings.optimizer
    name = str(optimizer if isinstance(optimizer, str) else optimizer.get("class_path", "")).rpartition(".")[2]
    config = method.config(base)
    trains_experts = Config.from_checkpoint(base).n_expert > 0 and (config.cut is None or config.lora_mlp)
    found = {
        f"optimizer {name}": name in OF_WHOLE_TENSORS or "8bit" in name,
        f"quantize {method.quantize}": method.quantize is not None,
        "modules_to_save": bool(config.modules_to_save),
        "LLaMA-Adapter": config.adapter_file != LoRAConfig.adapter_file,
        "train.replay of answer-only LoRA": bool(settings.train.replay) and config.alora_enabled,
        "trained experts of a mixture": trains_experts,
        "experts in groups": Config.from_checkpoint(base).n_expert_groups is not None,
    }
    return [what for what, is_so in found.items() if is_so]


def require_shardable(settings: Run, method: Method, base: Path) -> None:
    """Raise UserError if `strategy` fsdp is asked for and something else that does not work with it."""
    if settings.strategy == "fsdp" and (found := obstacles(settings, method, base)):
        raise UserError(f"strategy fsdp does not work with {', '.join(found)}: leave it out, or give --strategy ddp")


def choose(settings: Run, method: Method, base: Path, rank: Rank, samples: list[Sample], dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether the model is to be sharded, and a line that says why; the first process decides."""
    if settings.strategy != "auto" or rank.size == 1:
        is_fsdp = settings.strategy == "fsdp"
        if is_fsdp and (units := len(samples) // objective_of(settings).group) < rank.size:
            raise UserError(f"strategy fsdp: {rank.size} processes have only {units} training samples: use fewer processes")
        return is_fsdp, f"strategy {settings.strategy}, as given"
    need, room = _needed(settings, method, base, samples, dtype), _room(rank)
    found = obstacles(settings, method, base) if need > room else []
    is_fsdp = need > room and not found
    why = f"a copy of the model with gradients and optimizer takes about {gib(need)}, and each process has {gib(room)}"
    but = f"; fsdp does not work with {', '.join(found)}" if found else ""
    chosen: tuple[bool, str] = rank.broadcast((is_fsdp, f"strategy {'fsdp' if is_fsdp else 'ddp'}: {why}{but}"))
    return chosen


def _needed(settings: Run, method: Method, base: Path, samples: list[Sample], dtype: torch.dtype) -> int:
    """Return `litgpt.memory`'s estimate of a copy, in bytes."""
    config, train = method.config(base), settings.train
    estimated = estimate(
        config,
        sum(heapq.nlargest(train.micro_batch_size, (sample.n_inputs for sample in samples))),
        sum(heapq.nlargest(train.micro_batch_size, (sample.n_targets for sample in samples))),
        tied=checkpoint.is_tied(checkpoint.load_weights(base / checkpoint.WEIGHTS)),
        width=dtype.itemsize,
        full=config.cut is None,
        checkpointing=train.activation_checkpointing,
        nf4=(method.quantize or "").startswith(("bnb.nf4", "bnb.fp4")),
    )
    return estimated.total


def _room(rank: Rank) -> int:
    """Return the bytes that each process of this machine has for its copy."""
    if rank.device.type == "cuda":
        return int(torch.cuda.get_device_properties(rank.device).total_memory)
    assert rank.group is not None
    return int(psutil.virtual_memory().available / rank.group.place.local_size - PROCESS)
