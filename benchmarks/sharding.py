"""Peak memory of each rank, with a copy of the model for each (ddp) and a part (fsdp): real runs of `litgpt finetune_lora` and `_full`.

    python -m benchmarks.sharding CHECKPOINT --name SmolLM2-360M --processes 4

The model has random weights in the sizes that `--name` says, and the checkpoint's tokenizer. Each rank samples its resident memory from
when it begins to read the model. The same run of a model of 16 columns and 2 blocks tells what the program itself takes in the same way:
torch's parts that a run imports, the buffers of FSDP2 and gloo, the batches, their logits. It is subtracted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.process import environment
from litgpt.text import text_table

METHODS = {
    "LoRA, activations checkpointed": ["finetune_lora", "--train.activation_checkpointing", "true"],
    "Skip2-LoRA, not cached": ["finetune_lora", "--skip2lora_enabled", "true", "--skip2lora_cache", "off"],
    "all weights, activations checkpointed": ["finetune_full", "--train.activation_checkpointing", "true"],
}
SMALL = {"n_layer": 2, "n_embd": 16, "n_head": 1, "n_query_groups": 1, "head_size": 16, "intermediate_size": 16}
SETTINGS = ["--train.max_steps", "3", "--train.micro_batch_size", "1", "--eval.max_new_tokens", "0", "--eval.final_validation", "false"]


def worker(words: list[str], out: Path) -> None:
    """Run the command and write the peak of this process's memory, and what it held before the model was read."""
    from litgpt.__main__ import main
    from litgpt.train import run  # noqa: F401  all that a run imports
    from litgpt.train.methods import Method

    process, peak, before, over = psutil.Process(), [0], [0], threading.Event()
    build = Method.build

    def watched(*given: Any) -> Any:
        before[0] = process.memory_info().rss
        threading.Thread(target=sample, daemon=True).start()
        return build(*given)

    def sample() -> None:
        while not over.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.005)

    Method.build = watched  # type: ignore[method-assign, assignment]
    code = main(words)
    over.set()
    out.with_suffix(f".{os.environ.get('RANK', 0)}").write_text(
        json.dumps({"peak": peak[0] - before[0], "before": before[0], "code": code})
    )


def measured(words: list[str], processes: int) -> list[dict[str, int]]:
    """Return what each rank measured."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = Path(folder) / "peak"
        job = json.dumps([*words, "--out_dir", str(Path(folder) / "out")])
        children = []
        for rank in range(processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
            variables = {
                **environment(),
                "MASTER_ADDR": "127.0.0.1",
                "OMP_NUM_THREADS": "1",
                **{key: str(value) for key, value in place.items()},
            }
            command = [sys.executable, "-m", "benchmarks.sharding", "--worker", job, "--out", str(out), "."]
            children.append(subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True))
        errors = [child.communicate()[1] for child in children]
        if any(child.returncode for child in children):
            raise SystemExit("\n".join(errors)[-3000:])
        return [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(processes)]


def write_random(source: Path, folder: Path, name: str | None, precision: str, **sizes: int) -> Path:
    """Write a checkpoint with random weights, with the tokenizer of another. Return the folder."""
    import torch

    from litgpt.checkpoint import TOKENIZER_FILES, WEIGHTS, save_config, save_weights
    from litgpt.device import backbone_dtype
    from litgpt.lora import Config

    config = Config.from_name(name, lora_r=0) if name else Config.from_checkpoint(source, lora_r=0)
    for key, value in sizes.items():
        setattr(config, key, value)
    torch.set_default_dtype(backbone_dtype(precision))
    model = config.make_model()
    folder.mkdir()
    tied = dict(model.state_dict())
    if name is None or name.startswith("SmolLM2"):
        tied["lm_head.weight"] = tied["transformer.wte.weight"]
    save_weights(tied, folder / WEIGHTS)
    save_config(config, folder)
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copy(source / file, folder / file)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--name", help="sizes of this model in place of the checkpoint's")
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker), given.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "records.json"
        data.write_text(json.dumps([{"instruction": f"Add {i} and 1.", "input": "", "output": f"It is {i + 1}."} for i in range(40)]))
        model = write_random(given.checkpoint, Path(folder) / "model", given.name, given.precision)
        small = write_random(given.checkpoint, Path(folder) / "small", given.name, given.precision, **SMALL)
        describe(model, given.precision)
        rows: list[tuple[str, ...]] = [("method", "processes", "strategy", "the program's", "MiB of each rank above it")]
        for name in given.methods:
            command, *words = METHODS[name]
            for processes in given.processes:
                for strategy in ("ddp",) if processes == 1 else given.strategies:
                    common = ["--data", "JSON", "--data.json_path", str(data), "--data.val_split_fraction", "0.1", "--strategy", strategy]
                    size = ["--train.global_batch_size", str(processes), "--precision", given.precision]
                    peaks = [
                        [rank["peak"] >> 20 for rank in measured([command, str(base), *common, *SETTINGS, *size, *words], processes)]
                        for base in (small, model)
                    ]
                    above = ", ".join(f"{peak - program}" for program, peak in zip(*peaks, strict=True))
                    rows.append((name, str(processes), strategy, ", ".join(map(str, peaks[0])), above))
                    print(*rows[-1], flush=True)
    print(f"\n{text_table(rows, left=(0, 2, 4))}")


def describe(checkpoint: Path, precision: str) -> None:
    """Print the sizes of a model's parts."""
    from litgpt.device import backbone_dtype, on_meta
    from litgpt.lora import Config

    with on_meta():
        model = Config.from_checkpoint(checkpoint, lora_r=0).make_model()
    width = backbone_dtype(precision).itemsize
    blocks = sum(p.numel() for block in model.blocks for p in block.parameters()) * width
    embedding = model.config.V * model.config.n_embd * width
    one = blocks / 2**20 / model.config.n_layer
    print(f"blocks {blocks / 2**20:.0f} MiB, one of them {one:.1f}; embedding {embedding / 2**20:.0f} MiB\n", flush=True)


if __name__ == "__main__":
    main()
