"""Bytes over the wire against arithmetic, computed for steps of Llama 3 on 8 and 64 GPUs. Nothing is measured here.

Of a GPU: n tokens a step, N parameters of the blocks, W their bytes in bf16, P trained parameters, in fp32, k GPUs:

    arithmetic        all weights 6 N n, LoRA 4 N n, Skip2-LoRA 2 N n, cached 0; and 6 or 4 n V d for the head, d `n_embd`, V the vocabulary
    bytes, ddp        2 (k - 1)/k 4 P     all-reduce of the gradients
    bytes, fsdp       (k - 1)/k times W for each gathering of the blocks (forward, backward: 2, Skip2-LoRA 1, cached 0), and 4 P for the
                      gradients of sharded parameters; Skip2-LoRA's are reduced as under ddp
    memory, fsdp      2 N and 16 P over k; a frozen embedding and head, and Skip2-LoRA's adapters, are on each GPU
"""

from __future__ import annotations

from typing import NamedTuple

from litgpt.device import on_meta
from litgpt.lora import Config
from litgpt.text import text_table

TOKENS = 8192  # of a GPU in a step
FLOPS, UTILISATION = 989e12, 0.4  # H100 SXM, dense bf16
LINKS = {8: 450e9, 64: 50e9}  # bytes a second, one way: NVLink within a machine of 8; 400 Gbit/s for each GPU between machines
MEMORY = 80e9


class Way(NamedTuple):
    name: str
    config: dict[str, object]
    factor: int
    """floating-point operations for a block's parameter and token"""
    gathers: int


LORA = {f"lora_{layer}": True for layer in ("query", "key", "value", "projection", "mlp")}
SKIP: dict[str, object] = {"skip2lora_enabled": True, "skip2lora_block_indices": "last:6"}
WAYS = (
    Way("all weights", {}, 6, 2),
    Way("LoRA", {**LORA, "lora_r": 16}, 4, 2),
    Way("Skip2-LoRA", {**SKIP, "lora_r": 16}, 2, 1),
    Way("Skip2-LoRA, cached", {**SKIP, "lora_r": 16}, 0, 0),
)


def rows(name: str) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = []
    for way in WAYS:
        with on_meta():
            model = Config.from_name(name, **way.config).make_model()
        adapters = sum(p.numel() for key, p in model.named_parameters() if ".lora_" in key)
        total = sum(p.numel() for p in model.parameters()) - adapters
        head = model.config.V * model.config.n_embd
        blocks = total - 2 * head
        trained = adapters or total
        compute = (way.factor * blocks + (6 if way.factor == 6 else 4) * head) * TOKENS / FLOPS / UTILISATION
        for gpus, link in LINKS.items():
            share = (gpus - 1) / gpus
            copied, cut = 2 * share * 4 * trained, share * (2 * blocks * way.gathers + (4 * trained if way.gathers == 2 else 8 * trained))
            room = 2 * total + (16 * trained if adapters else 16 * total)
            copies = 2 * 2 * head if adapters else 0
            copies += 16 * trained if way.gathers < 2 else 0
            fits = "yes" if room < MEMORY else "no"
            row = (
                name,
                way.name,
                f"{gpus}",
                f"{1000 * compute:,.0f}",
                fits,
                _ms(copied, link),
                f"{(copies + (room - copies) / gpus) / 1e9:.1f}",
                _ms(cut, link),
            )
            table.append(row)
    return table


def _ms(count: float, link: float) -> str:
    return f"{count / 1e9:.2f} GB, {1000 * count / link:,.1f} ms"


def main() -> None:
    head = ("model", "method", "GPUs", "arithmetic, ms", "a copy fits", "ddp, over the wire", "fsdp, GB on each", "fsdp, over the wire")
    print(text_table([head, *rows("Llama-3-8B"), *rows("Llama-3-70B")], left=(0, 1)))


if __name__ == "__main__":
    main()
