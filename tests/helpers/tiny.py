"""Small random models for tests: in transformers, and the same weights in litgpt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import Tokenizer, processors

from litgpt import checkpoint, config as base_config, lora, model
from litgpt.adapters.base import adapter_parameters
from litgpt.adapters.heads import Head
from litgpt.convert.names import Stored, fit, hf_table, rows, slots
from litgpt.generate.engine import Session
from litgpt.generate.sampling import Sampling

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def randomise(module: torch.nn.Module, seed: int = 1) -> Any:
    """Values for every parameter, norms and biases included, that a mistake in any of them would show."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data = 0.5 + 0.2 * noise
        else:
            parameter.data = noise * 1.5 * parameter.shape[-1] ** -0.5
    return module.eval()


def hf_llama(**changes: Any) -> Any:
    settings = {**SIZES, "num_key_value_heads": 2, **changes}
    return randomise(transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)))


def hf_mistral(**changes: Any) -> Any:
    settings = {**SIZES, "num_key_value_heads": 2, "sliding_window": None, **changes}
    return randomise(transformers.MistralForCausalLM(transformers.MistralConfig(**settings)))


def hf_neox(**changes: Any) -> Any:
    return randomise(transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**{**SIZES, **changes})))


def converted(hf: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config fields and LitGPT state dict of a transformers model."""
    settings = hf.config.to_dict()
    config = base_config.Config.from_hf(settings)
    state = hf.state_dict()
    if settings["model_type"] == "gpt_neox":  # its name in files
        state["embed_out.weight"] = state.pop("lm_head.weight")
    tensors = {name: Stored(tuple(value.shape), lambda value=value: value.clone()) for name, value in state.items()}
    return config.base_dict(), assemble(tensors, settings["model_type"], config, settings["tie_word_embeddings"])


def assemble(tensors: dict[str, Stored], model_type: str, config: base_config.Config, tied: bool) -> dict[str, torch.Tensor]:
    """Return the LitGPT state dict of a Hugging Face model's tensors."""
    plan = fit(tensors, hf_table(model_type, config), config, "the test's model", tied)
    return {key: tensor for keys, load in plan.items() for tensor in [load()] for key in keys}


def hf_of(config: base_config.Config, weights: dict[str, torch.Tensor]) -> Any:
    """The other way for a tied llama: a transformers model, fp32, with a LitGPT state dict's weights."""
    hf = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.n_embd,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_query_groups,
            vocab_size=config.V,
            max_position_embeddings=config.block_size,
            rms_norm_eps=config.norm_eps,
            rope_theta=float(config.rope_base),
            tie_word_embeddings=True,
        )
    )
    named = {}
    for name, slot in slots(hf_table("llama", config), config, {key: tuple(value.shape) for key, value in weights.items()}).items():
        tensor = weights[slot.key].float()
        named[name] = tensor if slot.part == "all" else tensor[rows(slot.part, config)]
    hf.load_state_dict(named)
    return hf.eval()


def from_hf(hf: Any, **adapter: Any) -> Any:
    """The same model here; with adapter settings a `litgpt.lora.GPT`."""
    fields, weights = converted(hf)
    built: Any = lora.GPT(lora.Config(**fields, **adapter)) if adapter else model.GPT(base_config.Config(**fields))
    missing, unknown = built.load_state_dict(dict(weights), strict=False)
    assert not unknown and all(lora.lora_filter(name) for name in missing)
    return built.eval()


TINY: dict[str, Any] = {
    "name": "tiny",
    "block_size": 64,
    "vocab_size": 101,
    "padded_vocab_size": 101,
    "n_layer": 5,
    "n_head": 4,
    "n_embd": 32,
    "n_query_groups": 2,
    "intermediate_size": 72,
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
}
ALL_LORA: dict[str, bool] = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp", "head")}


def tiny(seed: int = 1, **settings: Any) -> Any:
    """A random `litgpt.lora.GPT` of 5 blocks, d 32; the same base weights for the same seed, whatever the adapter. B is 0."""
    built = lora.GPT(lora.Config(**{**TINY, **settings}))
    own = adapter_parameters(built)
    bases = [parameter for name, parameter in built.named_parameters() if name not in own]
    randomise(torch.nn.ParameterList(bases), seed)
    torch.manual_seed(seed)
    for module in built.modules():
        if isinstance(module, Head) or (isinstance(module, lora.LoRALayer) and module.r):
            module.reset_parameters()
    return built.eval()


def move_adapters(built: torch.nn.Module, seed: int = 3, size: float = 0.3) -> Any:
    """Give A and B random values, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in built.named_parameters():
        if lora.lora_filter(name):
            parameter.data = torch.randn(parameter.shape, generator=generator) * size
    return built


def ids(B: int, T: int, V: int = 101, seed: int = 7) -> torch.Tensor:
    """Random token ids (B, T)."""
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def generate(
    model: Any, prompt: torch.Tensor, length: int, stop_tokens: Sequence[Sequence[int]] = (), generator: Any = None, **sampling: Any
) -> Iterator[int]:
    """Return an iterator of the ids that follow `prompt` (T,), until both have `length` tokens. The call raises for what does not fit."""
    return Session(model).answer(prompt.tolist(), length - prompt.numel(), Sampling(**sampling), stop_tokens, generator)


def put_bos_first(folder: Path, token: str = "<|endoftext|>", number: int = 0) -> Path:
    """Let a folder's tokenizer.json begin every text with BOS."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(single=[token, "$A"], special_tokens=[(token, number)])
    backend.save(str(folder / "tokenizer.json"))
    return folder


SPEAKING: dict[str, Any] = {"vocab_size": 320, "padded_vocab_size": 320, "block_size": 256}
"""Sizes that go with the tiny tokenizer of conftest.py."""


def write_base(folder: Path, write_tokenizer: Callable[[Path], Path], **settings: Any) -> Path:
    """A checkpoint folder with a random model that has the tiny tokenizer's vocabulary."""
    built = tiny(**{**SPEAKING, **settings})
    write_tokenizer(folder)
    checkpoint.save_config(built.config, folder)
    checkpoint.save_weights(built.state_dict(), folder / "lit_model.pth")
    return folder


def write_adapter(folder: Path, base: Path, built: Any, **settings: Any) -> Path:
    """The adapter folder of a model: what `litgpt finetune` leaves, tokenizer and prompt style excepted."""
    folder.mkdir(parents=True)
    weights: Any = {"model": {name: value for name, value in built.state_dict().items() if lora.lora_filter(name)}}
    checkpoint.save_weights(weights, folder / "lit_model.pth.lora")
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({"checkpoint_dir": str(base), "precision": "32-true", **settings}))
    return folder


_TURNS = "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% else %}"
_OPEN = "<|im_start|>assistant\n"
THINKING = (  # as Qwen3's: the last reply has its reasoning, even if there is none
    _TURNS
    + "{{ '"
    + _OPEN
    + "' + ('<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' if loop.last else '') + m.content + '<|im_end|>\n' }}"
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '"
    + _OPEN
    + "' }}{% endif %}"
)
CHANNELS = (  # as gpt-oss's: special tokens around reasoning and content, and another end for the last reply
    _TURNS
    + "{% set why = m.reasoning_content if loop.last and not add_generation_prompt else '' %}"
    + "{{ '<|im_start|>assistant' + ('<|endoftext|>analysis<|im_start|>' + why + '<|endoftext|><|im_start|>assistant' if why else '') }}"
    + "{{ '<|endoftext|>final<|im_start|>' + m.content + ('<|im_end|>' if loop.last and not add_generation_prompt else '<|endoftext|>') }}"
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def set_template(folder: Path, template: str) -> Path:
    """Give a folder another chat template."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    return folder
