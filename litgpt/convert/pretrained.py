"""`litgpt convert_pretrained_checkpoint`: the model of a training run's step, without the state to resume from."""

from pathlib import Path

from litgpt import checkpoint
from litgpt.atomic import new_folder
from litgpt.config import Config
from litgpt.convert.resolve import locate
from litgpt.errors import UserError
from litgpt.prompts import copy_prompt_style
from litgpt.values import checked

COMPILED = "_orig_mod."  # in the names of a model that torch.compile wrapped


@checked
def convert_pretrained_checkpoint(checkpoint_dir: Path, output_dir: Path) -> None:
    """Make a checkpoint folder of a step of pretraining, ours or LitGPT's, without the optimizer's state.

    Args:
        checkpoint_dir: Folder of the step, with lit_model.pth.
        output_dir: Folder to make.
    """
    folder = locate(checkpoint_dir)
    if not (folder / checkpoint.WEIGHTS).is_file():
        hint = checkpoint.adapter_hint(folder) or ": name a step's folder of a training run"
        raise UserError(f"{folder} holds no {checkpoint.WEIGHTS}{hint}")
    from litgpt.convert.litgpt import require_finite

    weights = {name.replace(COMPILED, ""): value for name, value in checkpoint.load_weights(folder / checkpoint.WEIGHTS).items()}
    require_finite(weights, folder / checkpoint.WEIGHTS)
    with new_folder(output_dir) as new:
        checkpoint.save_weights(weights, new / checkpoint.WEIGHTS)
        checkpoint.save_config(Config.from_checkpoint(folder), new)
        checkpoint.copy_tokenizer_files(folder, new)
        copy_prompt_style(folder, new)
    print(f"{output_dir} is ready as a checkpoint_dir")
