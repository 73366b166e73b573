"""Peak memory of converting a 1 GiB checkpoint, in and out, as a share of its size, against loading all of it.

    python -m benchmarks.convert_memory [--gib 1.0] [--dir /tmp]

The checkpoint is a random Llama in bfloat16 in four shards. Each conversion runs in a separate process; this one reads /proc/PID/status
every few milliseconds and subtracts what the process held before (Python, torch, a model of one small block). RssAnon is the process's
own memory; RssAnon + RssFile also counts pages of mapped files, which the kernel can reclaim. Linux only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARDS = 4
CHILD = """
import sys, time
from pathlib import Path
import safetensors.torch, torch
from litgpt.convert import from_litgpt, hf
from litgpt.convert import litgpt as own
from litgpt.convert import write as writer
from litgpt.convert.names import fit, shapes
from litgpt.families import HF
from litgpt import checkpoint, config
kind, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
shapes(config.Config(n_layer=1, n_embd=64, n_head=2, vocab_size=64), "")
print("ready", flush=True)
sys.stdin.readline()
if kind == "in":
    hf.convert_hf(source, target)
elif kind == "out":
    from_litgpt.convert_from_litgpt(source, target, max_shard_size="300MB")
elif kind == "all in":
    stored = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in safetensors.torch.load_file(file).items():
            stored[name] = hf.Stored(tuple(tensor.shape), tensor.clone)
            stored[name].load()
    plan = fit(stored, HF["llama"].names, hf.choose_config(source, None), "", False)
    weights = {key: load() for keys, load in plan.items() for key in keys}
    target.mkdir()
    checkpoint.save_weights(weights, target / "lit_model.pth")
print("done", flush=True)
sys.stdin.readline()
"""


def make(folder: Path, gib: float) -> int:
    """Write a random Llama of about this size as sharded safetensors to `folder`; return its size in bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    d, m, groups, vocabulary = 2048, 5632, 512, 32000
    block: dict[str, tuple[int, ...]] = {"self_attn.q_proj": (d, d), "self_attn.k_proj": (groups, d), "self_attn.v_proj": (groups, d)}
    block |= {"self_attn.o_proj": (d, d), "mlp.gate_proj": (m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m), "input_layernorm": (d,)}
    block["post_attention_layernorm"] = (d,)
    ends: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocabulary, d), "model.norm": (d,), "lm_head": (vocabulary, d)}
    blocks = round((gib * 2**29 - 2 * vocabulary * d) / sum(torch.Size(shape).numel() for shape in block.values()))
    shapes = {"model.embed_tokens": ends.pop("model.embed_tokens")}
    shapes |= {f"model.layers.{i}.{name}": shape for i in range(blocks) for name, shape in block.items()} | ends
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=d, intermediate_size=m, num_hidden_layers=blocks, num_attention_heads=32, num_key_value_heads=8
    )
    folder.mkdir()
    config.save_pretrained(folder)
    names = list(shapes)
    weight_map, total = dict[str, str](), 0
    for number in range(SHARDS):
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        part = names[number * len(names) // SHARDS : (number + 1) * len(names) // SHARDS]
        tensors = {f"{name}.weight": torch.randn(shapes[name], dtype=torch.bfloat16) for name in part}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def as_bin(source: Path, folder: Path) -> None:
    """Write the same model as .bin shards."""
    import torch
    from safetensors.torch import load_file

    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    weight_map: dict[str, str] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors = load_file(file)
        name = f"pytorch_{file.stem}.bin"
        torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def held(pid: int) -> tuple[int, int]:
    """Return RssAnon, and RssAnon + RssFile + RssShmem, of a process, in bytes."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    anonymous, others = int(lines["RssAnon"].split()[0]), sum(int(lines[key].split()[0]) for key in ("RssFile", "RssShmem"))
    return 1024 * anonymous, 1024 * (anonymous + others)


def peaks(kind: str, source: Path, target: Path) -> tuple[int, int, float]:
    """Return the most that a conversion adds to either figure, and its seconds."""
    command = [sys.executable, "-c", CHILD, kind, str(source), str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None and child.stdout is not None
        while "ready" not in (line := child.stdout.readline()):
            assert line, "the conversion ended early"
        before = most = held(child.pid)
        start = time.perf_counter()
        child.stdin.write("\n")
        child.stdin.flush()
        while not (target.exists() and any(target.iterdir())) and child.poll() is None:
            now = held(child.pid)
            most = max(most[0], now[0]), max(most[1], now[1])
            time.sleep(0.002)
        seconds = time.perf_counter() - start
        child.communicate("\n")
        assert child.returncode == 0
    return most[0] - before[0], most[1] - before[1], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--dir", type=Path, help="where the files go for the time being: four times the size is needed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as name:
        folder = Path(name)
        size = make(folder / "hf", arguments.gib)
        as_bin(folder / "hf", folder / "bin")
        print(f"{size / 2**30:.2f} GiB in {SHARDS} shards; peak above the process's own, as a share of that\n")
        print("| conversion | own memory | with mapped files | seconds |\n|---|---|---|---|")
        runs = [
            ("safetensors to litgpt", "in", "hf", "lit"),
            (".bin to litgpt", "in", "bin", "lit2"),
            ("litgpt to safetensors", "out", "lit", "out"),
            ("safetensors to litgpt, all loaded", "all in", "hf", "lit3"),
        ]
        for label, kind, source, target in runs:
            own, total, seconds = peaks(kind, folder / source, folder / target)
            print(f"| {label} | {own / size:.3f} | {total / size:.3f} | {seconds:.1f} |", flush=True)
            if target != "lit":
                shutil.rmtree(folder / target)


if __name__ == "__main__":
    main()
