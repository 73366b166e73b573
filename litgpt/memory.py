"""The memory that fine-tuning takes, estimated from a config without running anything.

n tokens in a micro-batch, l of them with loss, w bytes of a backbone parameter, N parameters in the base, P in the adapters; d, H, G, h, m,
V as in `litgpt.model`, S taps, L' blocks that gradients cross. Bytes:

    weights       w N                      with bnb.nf4 the blocks' linear layers take 4.5 bits a parameter, with int8 8; frozen fp32
                                           layers are in fp16, once or twice, and the head besides; the head in bf16 twice more, or once
                                           if it is large, on a processor that multiplies it (`litgpt.packed`)
    training      12 N for all weights     the gradient and AdamW's two moments, fp32; 16 N with fp32 copies of bf16 weights
                  16 P for adapters        themselves, gradient and moments, fp32
    activations   n (L' + 1) A + f F + C            with checkpointing n (L' w d + A) + f F + C
      A  tensors that autograd keeps of a block for a token:
           w 3 (H + G) h + 4 H             qkv, the rotated q and k, attention's output and log-sums
           H K s                           scores of K keys, s = 6, or 4 in fp32, 4 more with a cap, with a cap or sinks
           w d                             for each norm
           w 2 m                           of a gated MLP, w m without a gate; for each of a mixture's experts in use, and w d
           w i                             inputs of the layers that learn, i wide, once for layers with one input; with dropout p of
                                           adapters 8 p i more, at least i, for each
      F  w 2 d + (2 w + 4) S d             the hidden state and its gradient; the taps, at f = l positions with the cut at ln_f or
                                           lm_head, else at f = n
      C  a chunk of logits                 4 of them where the head has an adapter; w V d more where it learns whole (`litgpt.loss`)

    reference     w R                      R parameters of Rho-1's reference model, which is freed before training: the larger of it and of
                                           training with activations counts

L' + 1 instead of L' accounts for the temporaries of a running block. Activation checkpointing keeps only the blocks' inputs, and A for the
one block that runs again. `PROCESS` is added for Python and torch. Each of p processes with a sharded model has (weights + training) / p,
its activations, and the parameters gathered at once: a block, and embedding and head if they are saved with an adapter.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from litgpt import lora
from litgpt.activations.cache import is_flat
from litgpt.adapters.base import Wrapper, adapter_parameters
from litgpt.device import default_device, on_meta
from litgpt.loss import CHUNK_BYTES
from litgpt.mlp import LLaMAMoE
from litgpt.model import Block, RMSNorm
from litgpt.packed import behind_cut, is_large, is_supported, packed_bytes
from litgpt.quantize import FOUR_BITS, GROUP, frozen_linears

NF4_BYTES = 0.5 + 4 / GROUP
PROCESS = 0.45 * 2**30


class Memory(NamedTuple):
    """The number of trained parameters, and bytes."""

    trained: int
    weights: int
    training: int
    activations: int
    gathered: int = 0  # bytes gathered at once in a sharded model
    reference: int = 0

    @property
    def total(self) -> int:
        return self.weights + max(self.training + self.activations, self.reference)

    def part(self, processes: int) -> int:
        """Return the total for each of `processes` processes that share a sharded model."""
        training = self.training // processes + self.activations
        return self.weights // processes + max(training, self.reference // processes) + self.gathered


def estimate(
    config: lora.Config,
    tokens: int,
    loss_tokens: int | None = None,
    *,
    tied: bool = False,
    width: int = 2,
    quantize: str | None = None,
    checkpointing: bool = False,
    keys: int = 0,
) -> Memory:
    """Return the memory to train the adapters of `config`, or all weights if it has none, on a micro-batch of `tokens` tokens.

    The stem counts once (`litgpt.packing`). `loss_tokens`: those of the tokens that carry loss (default: all). `tied`: the head and the
    embedding are one tensor. `width`: bytes of a parameter, 2 for bf16. `checkpointing`: `train.activation_checkpointing`.
    `keys`: tokens of the longest sample.
    """
    full = config.cut is None and not config.modules_to_save
    with on_meta():
        model = config.make_model()
    if not full:
        lora.mark_only_lora_as_trainable(model)
    adapters, saved = sum(p.numel() for p in adapter_parameters(model).values()), config.modules_to_save or []
    base = sum(p.numel() for p in model.parameters()) - adapters - (tied and not saved) * config.V * config.n_embd
    adapters -= (tied and len(saved) == 2) * config.V * config.n_embd  # a tied pair is one parameter
    quantised = sum(linear.weight.numel() for _, _, linear in frozen_linears(model)) if quantize else 0
    weights = width * (base - quantised) + (NF4_BYTES if quantize in FOUR_BITS else 1) * quantised
    if width == 4 and not full:
        behind = behind_cut(model)
        layers = [] if quantised else [linear for _, _, linear in frozen_linears(model)]
        weights += sum(packed_bytes(linear, id(linear) in behind) - 4 * linear.weight.numel() for linear in layers)
        weights += packed_bytes(model.head, backward=True) if "lm_head" not in saved else 0
    elif width == 2 and not full and "lm_head" not in saved and is_supported(torch.bfloat16) and default_device().type == "cpu":
        weights += (1 if is_large(model.head) else 2) * width * model.head.weight.numel()
    in_blocks = sum(p.numel() for block in model.blocks for p in block.parameters())
    outside = base + adapters - in_blocks if saved or (full and model.head.bias is not None) else 0  # else spread (`litgpt.vocabulary`)
    gathered = width * outside + weights * in_blocks // max(1, base * config.n_layer)
    crossed = model.blocks[model.cut or 0 :]
    n, d = tokens, config.n_embd
    tail_rows = loss_tokens if is_flat(model) and loss_tokens is not None else n
    if not (config.attention_logit_softcapping is not None or config.attention_sinks):
        keys = 0
    blocks = [kept_by_block(block, width, keys) for block in (*crossed, model.blocks[-1])]
    kept = len(crossed) * width * d + max(blocks) if checkpointing else sum(blocks)
    head = d * (2 * width + (2 * width + 4) * len(config.taps))
    chunks = CHUNK_BYTES * (4 if config.lora_r and config.lora_head else 1)
    if full or "lm_head" in saved:  # a micro-batch's gradient of the output layer, beside the sum
        chunks += (width if full else 4) * model.head.weight.numel()
    training = (16 if width < 4 else 12) * base if full else 16 * adapters
    return Memory(base if full else adapters, int(weights), training, int(n * kept + tail_rows * head + chunks), int(gathered))


def kept_by_block(block: Block, width: int, keys: int = 0) -> float:
    """Return A, bytes for a token. `keys`: K, 0 if attention keeps no scores."""
    attention: Any = block.attn
    config = attention.config
    numbers: float = 3 * (config.n_head + config.n_query_groups) * config.head_size
    numbers += learning_inputs(attention, width) + mlp_numbers(block.mlp, width)
    numbers += config.n_embd * sum(isinstance(norm, RMSNorm | nn.LayerNorm) for norm in block.modules())
    score = (4 if width == 4 else 6) + (4 if config.attention_logit_softcapping is not None else 0)
    return width * numbers + 4 * config.n_head + score * config.n_head * keys


def mlp_numbers(mlp: Any, width: int) -> float:
    """Return the values that autograd keeps of an MLP for a token."""
    if isinstance(mlp, LLaMAMoE):
        shared = mlp_numbers(mlp.shared_experts, width) if mlp.config.n_shared_expert else 0
        return mlp.config.n_expert_per_token * (mlp_numbers(mlp.experts[0], width) + mlp.config.n_embd) + shared
    m = mlp.proj.in_features  # an expert's own
    return (2 if hasattr(mlp, "fc_1") else 1) * m + learning_inputs(mlp, width)


def learning_inputs(part: nn.Module, width: int) -> float:
    """Return the values that autograd keeps for the trained linear layers, for a token."""
    total, inputs = 0.0, dict[str, int]()
    for name, layer in part.named_modules():
        shared = name.replace("fc_2", "fc_1")  # they read one input
        if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
            inputs[shared] = layer.in_features
        if isinstance(layer, lora.LoRALinear) and layer.r and layer.lora_A.requires_grad:
            inputs[shared] = layer.in_features
            p = layer.lora_dropout.p
            total += layer.in_features * max(1, 8 * p) / width if p else 0
        if isinstance(layer, Wrapper) and any(p.requires_grad for p in layer.parameters(recurse=False)):
            total += layer.out_features * layer.kept_outputs
    return total + sum(inputs.values())
