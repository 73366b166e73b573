"""`litgpt generate_full`, `generate_adapter` and `generate_adapter_v2`, as LitGPT has them. `litgpt generate FOLDER` reads them too."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.args import POSITIVE, function_of, setting
from litgpt.files import require_file
from litgpt.generate.base import Answers, Checkpoint


@dataclass
class Tuned(Answers, Checkpoint):
    """Answer with a base model and the file that fine-tuning wrote."""

    input: str = ""
    """Additional input to the question, which some prompt styles have a place for."""
    max_new_tokens: int = setting(100, POSITIVE)

    def answer(self, key: str, **how: Any) -> None:
        """Answer with the file that the setting `key` names; `how`: arguments of `LLM.load`."""
        file: Path = getattr(self, key)
        require_file(file, f"does not exist: name the file with the weights that fine-tuning wrote ({key})")
        self.show(self.opened(file.parent, **how), with_prompt=False, input=self.input)


@dataclass
class Adapter(Tuned):
    """Answer a prompt with a base model and a LLaMA-Adapter."""

    adapter_path: Path = Path("out/finetune/adapter/final/lit_model.pth.adapter")
    """The file with the adapter's weights, in the folder that fine-tuning wrote."""

    def main(self) -> None:
        self.answer("adapter_path", base=self.checkpoint_dir)


@dataclass
class AdapterV2(Adapter):
    """Answer a prompt with a base model and a LLaMA-Adapter V2."""

    adapter_path: Path = Path("out/finetune/adapter-v2/final/lit_model.pth.adapter_v2")


@dataclass
class Full(Tuned):
    """Answer a prompt with the weights of finetune_full. The tokenizer is the base model's."""

    finetuned_path: Path = Path("out/finetune/full/final/lit_model.pth")
    """The file with the weights, in the folder that fine-tuning wrote."""

    def main(self) -> None:
        self.answer("finetuned_path", tokenizer_dir=self.checkpoint_dir)


main = function_of(Adapter, "checkpoint_dir", "prompt", "input", "sys_prompt", "adapter_path", "quantize")
