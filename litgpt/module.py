"""`litgpt.LLM` as a torch module: forward passes with a loss, weights, saving, measuring, and moving to a device, as LitGPT has them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from litgpt import checkpoint
from litgpt.adapters.base import adapter_parameters
from litgpt.atomic import new_folder, read_manifest
from litgpt.device import backbone_dtype, default_precision, find_device
from litgpt.errors import UserError
from litgpt.files import expand_path
from litgpt.generate import divide
from litgpt.logs import peak_memory_gb
from litgpt.loss import chunked_cross_entropy
from litgpt.model import GPT
from litgpt.prompts import PromptStyle, save_prompt_style
from litgpt.quantize import is_quantised
from litgpt.sharding import on_cpu
from litgpt.text import first_line
from litgpt.tokenizer import Tokenizer
from litgpt.values import checked

Strategy = Literal["sequential", "tensor_parallel"]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Preprocessor(NamedTuple):
    """A tokenizer whose tensors are on the model's device."""

    tokenizer: Tokenizer
    device: torch.device

    def encode(self, text: str) -> torch.Tensor:
        return self.tokenizer.encode(text, device=self.device)

    def decode(self, token_ids: torch.Tensor) -> str:
        return self.tokenizer.decode(token_ids)


class ModelModule(nn.Module):
    """A model with its tokenizer, as a module whose weights are the model's own."""

    model: GPT
    tokenizer: Tokenizer
    prompt_style: PromptStyle
    folder: Path | None  # None: random weights
    generate_strategy: Strategy | None = None  # how the model is divided among several devices
    generate: Any

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def preprocessor(self) -> Preprocessor:
        return Preprocessor(self.tokenizer, self.device)

    @property
    def checkpoint_dir(self) -> Path | None:
        return self.folder

    def forward(
        self, input_ids: torch.Tensor, target_ids: torch.Tensor | None = None, loss_fn: Loss | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, T, V) of ids (B, T); with targets (B, T), which are shifted here, the mean loss as well."""
        logits = self.model(input_ids)
        if target_ids is None:
            return logits
        return logits, (loss_fn or chunked_cross_entropy)(logits[..., :-1, :], target_ids[..., 1:])

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's state dict, with its own names."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)

    @checked
    def trainer_setup(self, trainer_ckpt: str | Path | None = None) -> None:
        """Prepare the model for a Trainer: fp32 weights that all learn, those of `trainer_ckpt`, a file that a Trainer saved, if given."""
        if trainer_ckpt is not None:
            try:
                state = torch.load(expand_path(trainer_ckpt), map_location="cpu", weights_only=True)["state_dict"]
                first = next(iter(state)).partition("transformer.")[0].partition("lm_head.")[0]
            except Exception as error:
                raise UserError(f"trainer_ckpt: {trainer_ckpt} is no file that a Trainer saved: {first_line(error)[:200]}") from None
            self.model.float()
            self.load_state_dict({name.removeprefix(first): value for name, value in state.items()})
        elif self.folder is not None:
            self.model, self.generate_strategy = checkpoint.load_model(self.folder, torch.float32), None
        self.model.float().train().requires_grad_(True)

    @checked
    def distribute(
        self,
        accelerator: str = "auto",
        devices: int | str = "auto",
        precision: str | None = None,
        quantize: str | None = None,
        generate_strategy: Strategy | None = None,
        fixed_kv_cache_size: int | Literal["max_model_supported"] | None = None,
    ) -> None:
        """Move the model to a device (cpu, cuda, xpu, mps or auto), in this precision, quantised if asked for.

        Several `devices` need a `generate_strategy` (`litgpt.generate.divide`). For "tensor_parallel" this script is run once more for each
        further device, unless torchrun has started them; each process gets every answer, and RANK in its environment numbers it.
        `fixed_kv_cache_size` is the most tokens that prompt and answer may have together, of which keys and values are kept.
        """
        if self.folder is None:
            raise UserError("distribute: the model has random weights: it is where it is")
        if generate_strategy is None and devices not in ("auto", 1):
            raise UserError(f'distribute: {devices!r} devices need a generate_strategy: "sequential" or "tensor_parallel"')
        device = find_device(None if accelerator == "auto" else {"gpu": "cuda"}.get(accelerator, accelerator))
        precision = (precision or default_precision(device)).replace("-mixed", "-true")
        dtype, home = backbone_dtype(precision), device if generate_strategy is None else torch.device("cpu")
        homes = divide.places(device, devices) if generate_strategy == "sequential" else []
        rank = divide.processes(device, devices, precision, quantize) if generate_strategy == "tensor_parallel" else None
        model = checkpoint.load_model(self.folder, dtype, home, quantize=quantize)
        if isinstance(fixed_kv_cache_size, int):
            if not 1 <= fixed_kv_cache_size <= model.max_seq_length:
                raise UserError(f"fixed_kv_cache_size is {fixed_kv_cache_size}: from 1 to {model.max_seq_length} tokens are possible")
            model.max_seq_length = fixed_kv_cache_size
        if homes:
            divide.spread(model, homes)
        if rank is not None:
            divide.shard(model, rank.index, rank.size, rank.sum)
            model.to(rank.device)
        self.model, self.generate_strategy = model, generate_strategy

    @checked
    def save(self, out_dir: str | Path, prompt_style: PromptStyle | None = None) -> None:
        """Write a checkpoint folder with the weights as they are now, in place of an earlier one of ours, if there is one."""
        if adapter_parameters(self.model) or is_quantised(self.model) or self.generate_strategy == "tensor_parallel":
            raise UserError("save: only a whole model without adapters, and not quantised, can be saved: `litgpt merge_lora` merges LoRA")
        target = expand_path(out_dir)
        if target.exists() and any(source and target.samefile(source) for source in (self.folder, self.tokenizer.folder)):
            raise UserError(f"save: {target} is the folder that the model was read from: name another one")
        with new_folder(target, overwrite=read_manifest(target) is not None) as folder:
            checkpoint.save_weights(on_cpu(self.model.state_dict(keep_vars=True)), folder / checkpoint.WEIGHTS)
            checkpoint.save_config(self.model.config, folder)
            checkpoint.copy_tokenizer_files(self.tokenizer.folder, folder)
            save_prompt_style(prompt_style or self.prompt_style, folder)

    @checked
    def benchmark(self, num_iterations: int = 1, **kwargs: Any) -> tuple[str, dict[str, list[float]]]:
        """Return the answer of the last of `num_iterations` calls of `generate`, and lists of what each took."""
        figures: dict[str, list[float]] = {}
        text = ""
        for _ in range(num_iterations):
            start, ids, first = time.perf_counter(), list[int](), 0.0
            for token in self.generate(**{**kwargs, "stream": True, "return_as_token_ids": True}):
                first = first or time.perf_counter() - start
                ids.append(token)
            total, text = time.perf_counter() - start, self.tokenizer.decode(ids)
            on_gpu = peak_memory_gb(self.device) if self.device.type == "cuda" else 0.0
            row = {
                "Seconds total": total,
                "Seconds to first token": first,
                "Tokens generated": len(ids),
                "Inference speed in tokens/sec": len(ids) / total,
                "Total GPU memory allocated in GB": on_gpu,
            }
            for name, value in row.items():
                figures.setdefault(name, []).append(value)
        return text, figures


def benchmark_dict_to_markdown_table(data: Mapping[str, Sequence[float]]) -> str:
    """Return means and standard deviations of the figures of `benchmark` as a table; nan for a single figure."""
    rows = [("Metric", "Mean", "Std Dev")]
    for name, figures in data.items():
        values = torch.tensor(figures, dtype=torch.float64)
        deviation = float(values.std()) if len(figures) > 1 else math.nan
        rows.append((name, f"{float(values.mean()):.2f}", f"{deviation:.2f}"))
    lines = [f"| {name:<35} | {mean:<27} | {deviation:<27} |\n" for name, mean, deviation in rows]
    return "".join([lines[0], f"|{'-' * 37}|{'-' * 29}|{'-' * 29}|\n", *lines[1:]])
