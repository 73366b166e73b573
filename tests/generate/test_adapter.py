"""The options of `generate_adapter` are LitGPT's; `tests/finetune/test_adapter.py` runs the commands."""

import inspect

from litgpt.generate.adapter import main, main_v2


def test_options_and_defaults() -> None:
    first, second = (
        {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()} for command in (main, main_v2)
    )
    names = "checkpoint_dir prompt input sys_prompt adapter_path quantize max_new_tokens top_k top_p temperature precision seed"
    assert list(first) == list(second) == names.split()
    assert {name for name in first if first[name] != second[name]} == {"adapter_path"}
    assert second["adapter_path"].name == "lit_model.pth.adapter_v2" and main_v2.__doc__ and "V2" in main_v2.__doc__
