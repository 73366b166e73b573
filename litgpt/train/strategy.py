"""How the processes of a run share the model: a copy for each (ddp), or a part (fsdp)."""

import heapq
from typing import Any

import psutil
import torch

from litgpt import checkpoint
from litgpt.errors import UserError
from litgpt.lora import Config as LoRAConfig
from litgpt.memory import PROCESS, Memory, estimate
from litgpt.objectives.named import objective_of
from litgpt.objectives.reference import reference_size
from litgpt.quantize import EIGHT_BITS, FOUR_BITS
from litgpt.sample import Sample
from litgpt.sharding import reduces_unused_gradients
from litgpt.text import counted, gib
from litgpt.train.methods import Method
from litgpt.train.parallel import Rank
from litgpt.train.settings import Run

OF_WHOLE_TENSORS = ("Adafactor", "Muon")  # optimizers whose update of an element depends on others in its tensor


def obstacles(settings: Run, method: Method) -> list[str]:
    """Return the settings that do not work with a sharded model."""
    optimizer: Any = settings.optimizer
    name = str(optimizer if isinstance(optimizer, str) else optimizer.get("class_path", "")).rpartition(".")[2]
    config, quantize = method.config(settings.checkpoint_dir), method.quantize
    trains_experts = config.n_expert > 0 and (config.cut is None or config.lora_mlp)
    found = {
        f"optimizer {name}": name in OF_WHOLE_TENSORS or "8bit" in name,
        f"quantize {quantize} (int8 works)": quantize in FOUR_BITS,
        f"quantize {quantize} and torch {torch.__version__} (2.12 works)": quantize in EIGHT_BITS and torch.__version__ < "2.12",
        f"trained experts of a mixture and torch {torch.__version__}": trains_experts and not reduces_unused_gradients(),
    }
    return [what for what, is_so in found.items() if is_so]


def require_shardable(settings: Run, method: Method) -> None:
    """Raise UserError for `strategy` fsdp with settings that do not work with it, and for `cpu_offload` without it."""
    if settings.cpu_offload and settings.strategy == "ddp":
        raise UserError("cpu_offload keeps parts of a sharded model, and strategy ddp has none: give --strategy fsdp, or leave it out")
    if settings.wants_shards and (found := obstacles(settings, method)):
        raise UserError(f"strategy fsdp does not work with {', '.join(found)}: leave it out, or give --strategy ddp")


def choose(settings: Run, method: Method, rank: Rank, samples: list[Sample], dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether the model is to be sharded, and a line that says why; the first process decides."""
    if settings.wants_shards or settings.strategy == "ddp" or rank.size == 1:
        is_fsdp = settings.wants_shards
        if is_fsdp and (units := len(samples) // objective_of(settings).group) < rank.size:
            raise UserError(f"strategy fsdp: {rank.size} processes have only {counted(units, 'training sample')}: use fewer processes")
        return is_fsdp, f"strategy {'fsdp' if is_fsdp else settings.strategy}, as given{' (cpu_offload)' if settings.cpu_offload else ''}"
    base = settings.checkpoint_dir
    tied = checkpoint.is_tied(checkpoint.load_weights(base / checkpoint.WEIGHTS))
    need = estimate_of(settings, method, method.config(base), samples, dtype, tied)[0].total
    if rank.device.type == "cuda":
        room = int(torch.cuda.get_device_properties(rank.device).total_memory)
    else:
        assert rank.group is not None
        room = int(psutil.virtual_memory().available / rank.group.place.local_size - PROCESS)
    found = obstacles(settings, method) if need > room else []
    is_fsdp = need > room and not found
    why = f"a copy of the model with gradients and optimizer takes about {gib(need)}, and each process has {gib(room)}"
    but = f"; fsdp does not work with {', '.join(found)}" if found else ""
    chosen: tuple[bool, str] = rank.broadcast((is_fsdp, f"strategy {'fsdp' if is_fsdp else 'ddp'}: {why}{but}"))
    return chosen


def estimate_of(
    settings: Run, method: Method, config: LoRAConfig, samples: list[Sample], dtype: torch.dtype, tied: bool, stem: int = 0
) -> tuple[Memory, int]:
    """Return `litgpt.memory`'s estimate of a run, and the tokens of its largest micro-batch. `stem`: tokens that all samples begin with."""
    train, objective = settings.train, objective_of(settings)
    size = train.micro_batch_size * objective.group
    tokens = stem + sum(heapq.nlargest(size, (sample.n_inputs - stem for sample in samples)))
    targets = sum(heapq.nlargest(size, (sample.n_targets for sample in samples)))
    estimated = estimate(
        config,
        tokens,
        targets,
        tied=tied,
        width=dtype.itemsize,
        checkpointing=train.activation_checkpointing,
        quantize=method.quantize,
        keys=max((sample.n_inputs for sample in samples), default=0),
    )
    reference = 0 if objective.reference is None else dtype.itemsize * reference_size(objective.reference)
    return estimated._replace(reference=reference), tokens
