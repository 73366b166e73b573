"""LitGPT's module paths that have no file here: `litgpt.scripts.merge_lora.merge_lora` is `litgpt.convert.merge.merge_lora`."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

# Names by module. A settings class is followed by the arguments that LitGPT's function takes by position.
MODULES = {
    "chat.base": {"generate": "generate.functions:generate_fn", "main": "generate.chat:Chat checkpoint_dir"},
    "deploy.serve": {"run_server": "serve.command:Serve checkpoint_dir quantize precision temperature top_k top_p max_new_tokens"},
    "eval.evaluate": {"convert_and_evaluate": "evaluate:evaluate"},
    "finetune.adapter_v2": {"setup": "finetune.adapter:AdapterV2 checkpoint_dir out_dir precision quantize"},
    "finetune.lora_legacy": {"setup": "finetune.lora:Lora checkpoint_dir out_dir precision quantize"},
    "generate.adapter": {"main": "generate.base:Adapter checkpoint_dir prompt input sys_prompt adapter_path quantize"},
    "generate.adapter_v2": {"main": "generate.base:AdapterV2 checkpoint_dir prompt input sys_prompt adapter_path quantize"},
    "generate.full": {"main": "generate.base:Full checkpoint_dir prompt input sys_prompt finetuned_path quantize"},
    "generate.sequentially": {"main": "generate.base:Sequentially checkpoint_dir prompt"},
    "generate.speculative_decoding": {"main": "generate.base:Speculatively draft_model_checkpoint_dir target_model_checkpoint_dir prompt"},
    "generate.tp": {"main": "generate.base:TensorParallel checkpoint_dir prompt"},
    "parser_config": {"save_hyperparameters": "utils:save_hyperparameters"},
    "scripts.convert_hf_checkpoint": {"convert_hf_checkpoint": "convert.to_litgpt:convert_to_litgpt"},
    "scripts.convert_lit_checkpoint": {"convert_lit_checkpoint": "convert.from_litgpt:convert_from_litgpt"},
    "scripts.convert_pretrained_checkpoint": {"convert_pretrained_checkpoint": "convert.to_litgpt:convert_pretrained_checkpoint"},
    "scripts.download": {"download_from_hub": "download:download_from_hub"},
    "scripts.merge_lora": {"merge_lora": "convert.merge:merge_lora"},
    "scripts.validate": {"validate_setup": "validate:validate"},
}
DATA = {"alpaca_2k": "Alpaca2k", "alpaca_gpt4": "AlpacaGPT4", "deita": "Deita", "flan": "FLAN", "lima": "LIMA", "longform": "LongForm"}
DATA |= {"microllama": "MicroLlama", "openwebtext": "OpenWebText", "tinyllama": "TinyLlama", "tinystories": "TinyStories"}
MODULES |= {f"data.{module}": {name: f"data:{name}"} for module, name in DATA.items()}
FOLDERS = {name.partition(".")[0] for name in MODULES if "." in name}


def load(target: str) -> Any:
    """Return the member `module:member` of this package."""
    module, member = target.split(":")
    return getattr(importlib.import_module(f"litgpt.{module}"), member)


class Aliases:
    """Finder and loader of MODULES, used where no other finder matches. The base classes, in importlib.abc, take 20 ms to import."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        known = package == "litgpt" and (name in MODULES or name in FOLDERS)
        return ModuleSpec(fullname, cast("Any", self), is_package=name in FOLDERS) if known else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python."""

    def exec_module(self, module: ModuleType) -> None:
        from litgpt.args import function_of

        for name, target in MODULES.get(module.__name__.partition(".")[2], {}).items():
            found, *names = target.split()
            setattr(module, name, function_of(load(found), *names) if names else load(found))


sys.meta_path.append(Aliases())
