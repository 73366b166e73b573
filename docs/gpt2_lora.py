"""LoRA on GPT-2 small: how many parameters learn. Nothing is downloaded.

    python docs/gpt2_lora.py

All of GPT-2 is frozen, and a layer with `in` inputs and `out` outputs gets r (in + out) parameters. A count of what learns that includes
the embeddings (38,597,376 of the tokens and 786,432 of the positions) is wrong: they have `requires_grad=False` and get no gradient. They
slip in where only the layers with LoRA are frozen, or where everything but those layers is counted.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from litgpt.lora import apply_lora, get_lora_parameters

TARGETS = (["c_attn"], ["attn.c_attn", "attn.c_proj"], ["c_fc", "mlp.c_proj"], ["c_attn", "c_fc", "c_proj"], ["square"], ["all-linear"])

if __name__ == "__main__":
    print(f"{'LoRA on':<28} {'r':>3} {'before':>12} {'with LoRA':>12} {'learn':>10} {'share':>7} {'wrong: with embeddings':>23}")
    for names in TARGETS:
        for r in (4, 8, 16):
            with torch.device("meta"):  # shapes without values
                model = GPT2LMHeadModel(GPT2Config())
            before = sum(parameter.numel() for parameter in model.parameters())
            apply_lora(model, names[0] if len(names) == 1 else names, r=r)
            total = sum(parameter.numel() for parameter in model.parameters())
            learn = sum(parameter.numel() for parameter in get_lora_parameters(model))
            assert learn == total - before == sum(p.numel() for p in model.parameters() if p.requires_grad)
            embeddings = sum(table.weight.numel() for table in (model.transformer.wte, model.transformer.wpe))
            print(f"{', '.join(names):<28} {r:>3} {before:>12,} {total:>12,} {learn:>10,} {learn / total:>7.2%} {learn + embeddings:>23,}")
