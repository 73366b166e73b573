"""The peers: their names, settings and commands."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.job import BATCH, LORA_ALPHA, LORA_DROPOUT, LORA_R, SEED, Job
from benchmarks.process import ROOT
from litgpt.errors import UserError

HERE = Path(__file__).parent
SKIP2LORA = ROOT / "config_hub" / "finetune" / "smollm2-135m" / "skip2lora.yaml"
RATES = {"qv": 2e-4, "all": 5e-4}  # best measured peak rates of LoRA on queries and values, and on all linear layers
WEIGHT_DECAY = 0.01  # the default of torch's AdamW
NEVER = 10**6


@dataclass(frozen=True)
class Peer:
    """One way to do the job."""

    name: str
    kind: str  # whose code runs: upstream, peft or litgpt
    layers: str = ""  # of LoRA: qv or all
    words: tuple[str, ...] = ()  # of `litgpt finetune`, for other methods than LoRA: a YAML file and options
    slow: bool = False  # every epoch runs the complete model: --measured_epochs shortens such runs
    own_schedule: bool = False  # epochs, warm-up and decay are those of its YAML file


PEERS = (
    Peer("upstream", "upstream", "qv", slow=True),
    Peer("peft_qv", "peft", "qv", slow=True),
    Peer("peft_all", "peft", "all", slow=True),
    Peer("lora_qv", "litgpt", "qv", slow=True),
    Peer("lora_all", "litgpt", "all", slow=True),
    Peer("skip2lora_uncached", "litgpt", words=(str(SKIP2LORA), "--skip2lora_cache", "off"), slow=True),
    Peer("skip2lora", "litgpt", words=(str(SKIP2LORA), "--skip2lora_cache", "memory")),
    Peer("skip2lora_disk", "litgpt", words=(str(SKIP2LORA), "--skip2lora_cache", "disk")),
)


def choose(names: list[str] | None, presets: list[str]) -> list[Peer]:
    """Return the peers of these names (all without any) and those of the presets, NAME=FILE.yaml followed by options.

    Raise UserError that lists everything that is wrong.
    """
    known = {peer.name: peer for peer in PEERS}
    chosen = [known[name] for name in dict.fromkeys(known if names is None else names) if name in known]
    problems = [f"--peers {name}: there are {', '.join(known)}" for name in names or () if name not in known]
    for text in presets:
        name, _, command = text.partition("=")
        words = shlex.split(command)
        if not re.fullmatch(r"\w+", name) or not words:
            problems.append(f"--preset {text!r} is not of the form NAME=FILE.yaml")
        elif name in known or name in (peer.name for peer in chosen):
            problems.append(f"--preset {name} is the name of another peer")
        elif not Path(words[0]).is_file():
            problems.append(f"--preset {name}: {words[0]} does not exist")
        else:
            chosen.append(Peer(name, "litgpt", words=(str(Path(words[0]).resolve()), *words[1:]), own_schedule=True))
    if problems:
        raise UserError("; ".join(problems))
    return chosen


def command(peer: Peer, job: Job, out: Path, folder: Path, epochs: int) -> list[str]:
    """Return the words that run the peer for `epochs` in its own, empty `folder`."""
    if peer.kind == "litgpt":
        return [sys.executable, "-m", "litgpt", "finetune_lora", *own_words(peer, job, out, folder, epochs)]
    run = {
        "checkpoint": str(out / "hf" / Path(job.checkpoint).name),
        "tokens": str(out / "data" / "tokens.json"),
        "out_dir": str(folder / "run"),
        "steps": str(folder / "steps.json"),
        "precision": job.precision,
        "epochs": epochs,
        "batch": BATCH,
        "warmup": job.warmup(epochs),
        "rate": RATES[peer.layers],
        "weight_decay": WEIGHT_DECAY,
        "layers": peer.layers,
        "r": LORA_R,
        "alpha": LORA_ALPHA,
        "dropout": LORA_DROPOUT,
        "save_interval": job.steps_per_epoch,
        "seed": SEED,
    }
    (folder / "run.json").write_text(json.dumps(run, indent=1))
    python = out / "upstream-venv" / "bin" / "python" if peer.kind == "upstream" else sys.executable
    return [str(python), str(HERE / f"with_{peer.kind}.py"), str(folder / "run.json")]


def own_words(peer: Peer, job: Job, out: Path, folder: Path, epochs: int) -> list[str]:
    """Return the words after `litgpt finetune`: no validation, and a checkpoint after every epoch."""
    options: dict[str, object] = {
        "checkpoint_dir": job.checkpoint,
        "out_dir": folder / "run",
        "data": "JSON",
        "data.json_path": out / "data",
        "data.mask_prompt": "true",
        "precision": job.precision,
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": BATCH,
        "train.save_interval": job.steps_per_epoch,
        "train.keep_best": "false",
        "eval.interval": NEVER,
        "eval.max_iters": 1,
        "eval.initial_validation": "false",
        "eval.final_validation": "false",
        "eval.max_new_tokens": 0,
        "skip2lora_cache_dir": folder / "cache",
        "seed": SEED,
    }
    if not peer.own_schedule:
        options |= {"train.epochs": epochs, "train.lr_warmup_steps": job.warmup(epochs), "train.min_lr": 0}
    if peer.layers:
        options |= {"lora_r": LORA_R, "lora_alpha": LORA_ALPHA, "lora_dropout": LORA_DROPOUT, "optimizer.lr": RATES[peer.layers]}
        options |= {f"lora_{name}": str(peer.layers == "all").lower() for name in ("key", "projection", "mlp")}
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [*peer.words[:1], *given, *peer.words[1:]]
