"""The MLPs of a block: dense, gated, and mixtures of experts. Letters in shapes: as in `litgpt.model`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.config import CORRECTION, Config
from litgpt.fused import gated
from litgpt.packing import take


class GptNeoxMLP(nn.Module):
    """proj(gelu(fc(x)))"""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)
        self.approximate = config.gelu_approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, T, m) -> (B, T, d)"""
        return self.proj(F.gelu(self.fc(x), approximate=self.approximate))


class LLaMAMLP(nn.Module):
    """SwiGLU, arXiv 2002.05202: proj(silu(fc_1(x)) * fc_2(x)); m is `intermediate_size` unless given."""

    approximate: str | None = None  # of gelu; None: silu

    def __init__(self, config: Config, m: int | None = None) -> None:
        super().__init__()
        m = m or config.intermediate_size
        self.fc_1 = nn.Linear(config.n_embd, m, bias=config.bias)
        self.fc_2 = nn.Linear(config.n_embd, m, bias=config.bias)
        self.proj = nn.Linear(m, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., m) -> (..., d)"""
        return self.proj(gated(self.fc_1(x), self.fc_2(x), self.approximate))


class GemmaMLP(LLaMAMLP):
    """GeGLU, arXiv 2002.05202: proj(gelu(fc_1(x)) * fc_2(x))"""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.approximate = config.gelu_approximate


class ClampedMLP(LLaMAMLP):
    """SwiGLU with clamped inputs (gpt-oss, arXiv 2508.10925): proj(g sigmoid(alpha g) (u + 1)), with g = min(fc_1(x), c) and u = fc_2(x)
    clamped to [-c, c]; alpha and c are `swiglu_alpha` and `swiglu_limit`.
    """

    def __init__(self, config: Config, m: int | None = None) -> None:
        super().__init__(config, m)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., m) -> (..., d)"""
        gate, up = self.fc_1(x).clamp(max=self.limit), self.fc_2(x).clamp(-self.limit, self.limit)  # type: ignore[operator]
        return self.proj(gate * torch.sigmoid(self.alpha * gate) * (up + 1))


class LLaMAMoE(nn.Module):
    """A sparse mixture of E experts (Mixtral, arXiv 2401.04088): the sum of w_e expert_e(x) over the k experts e that `route` chooses for a
    token, plus the experts that all tokens share (DeepSeekMoE, arXiv 2401.06066).

    The shared experts are one MLP, `n_shared_expert` times as wide; in Qwen 2 it is multiplied by sigmoid(shared_expert_gate(x)).
    Each expert runs once, over all its tokens. Training with `router_aux_loss_coef` keeps the gate's logits for `GPT.auxiliary_loss`.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(config) if config.n_expert_groups else nn.Linear(config.n_embd, config.n_expert, bias=config.router_bias)
        expert = ClampedMLP if config.swiglu_limit else LLaMAMLP
        self.experts = nn.ModuleList(expert(config, config.moe_intermediate_size) for _ in range(config.n_expert))
        if config.n_shared_expert:
            self.shared_experts = LLaMAMLP(config, config.expert_size * config.n_shared_expert)
        if config.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(config.n_embd, 1, bias=False)
        self.router_logits: torch.Tensor | None = None
        self.switch: Any = None  # a `litgpt.adapters.switch.Switch`, which needs to know the rows of x that an expert gets

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)"""
        k = self.config.n_expert_per_token
        router = self.gate(x)  # (B, T, E)
        wanted = self.training and self.config.router_aux_loss_coef and torch.is_grad_enabled()
        self.router_logits = router if wanted else None
        bias = getattr(getattr(self.gate, "linear", self.gate), CORRECTION, None)  # LoRA may wrap the router
        weights, chosen = route(router.flatten(0, -2), self.config, bias)  # (N, k) each
        order = chosen.flatten().argsort(stable=True)  # (N k): pairs of token and expert, by expert
        counts = chosen.flatten().bincount(minlength=self.config.n_expert).tolist()
        flat, done = x.flatten(0, -2), []
        for expert, rows in zip(self.experts, (order // k).split(counts), strict=True):
            if self.switch is not None:
                self.switch.rows = rows
            if len(rows):
                done.append(expert(take(flat, rows)))
        if self.switch is not None:
            self.switch.rows = None
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        each = take(torch.cat(done), back).unflatten(0, (-1, k))  # (N, k, d)
        y = (each * weights.to(each.dtype)[..., None]).sum(1).view_as(x)
        if not self.config.n_shared_expert:
            return y
        shared = self.shared_experts(x)
        return y + (self.shared_expert_gate(x).sigmoid() * shared if self.config.shared_expert_gate else shared)


class Router(nn.Linear):
    """The gate of experts in groups: logits (..., E) in fp32, and the bias with which training balanced the experts in `route`."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.n_embd, config.n_expert, bias=False)
        if not config.router_softmax:
            self.register_buffer(CORRECTION, torch.zeros(config.n_expert))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight.float())


def route(logits: torch.Tensor, config: Config, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weights of each token's k experts and their numbers, (N, k) each, for logits (N, E).

    The experts with the largest p = softmax(logits) are chosen, with weights w = p. For experts in groups p = sigmoid(logits), and the
    largest p + bias are chosen (DeepSeek-V3, arXiv 2412.19437), or with `router_softmax` the largest softmax (DeepSeek-V2, arXiv
    2405.04434), only within the `n_topk_groups` groups whose best `n_topk_scores_per_group` experts have the largest sums. With
    `norm_topk_prob` w is scaled to sum to 1; w is multiplied by `routed_scaling_factor`.
    """
    groups = config.n_expert_groups
    scores = logits.float().sigmoid() if groups and not config.router_softmax else logits.softmax(-1, dtype=torch.float32)
    ranked = scores if bias is None else scores + bias
    if groups:
        best = ranked.unflatten(-1, (groups, -1)).topk(config.n_topk_scores_per_group or 1).values.sum(-1)  # (N, groups)
        open_groups = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(config.n_topk_groups or groups).indices, True)
        ranked = ranked.masked_fill(~open_groups.repeat_interleave(config.n_expert // groups, 1), -torch.inf)
    chosen = ranked.topk(config.n_expert_per_token).indices
    weights = scores.gather(1, chosen)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights if config.routed_scaling_factor == 1 else weights * config.routed_scaling_factor, chosen


def load_balance(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Return E sum_e f_e P_e for router logits (N, E): f_e is expert e's share of tokens, P_e its mean probability.

    It is k if all experts are used equally often, else larger; fp32. Switch Transformer, arXiv 2101.03961 (4) to (6), for k choices.
    """
    p = logits.softmax(-1, dtype=torch.float32)
    chosen = p.topk(k).indices.flatten()
    f = chosen.bincount(minlength=p.size(-1)) / p.size(0)  # (E,)
    return p.size(-1) * (f * p.mean(0)).sum()


MLPS: dict[str, Callable[[Config], nn.Module]] = {kind.__name__: kind for kind in (GptNeoxMLP, LLaMAMLP, GemmaMLP, LLaMAMoE)}


def mlp(config: Config, block_idx: int) -> nn.Module:
    """Return the MLP of a block: the first `first_k_dense_replace` blocks of a mixture are dense."""
    return LLaMAMLP(config) if block_idx < (config.first_k_dense_replace or 0) else MLPS[config.mlp_class_name](config)
