"""`litgpt add_tokens`: add tokens to a checkpoint's tokenizer, with rows for them in the embedding and the output layer."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt import atomic, checkpoint
from litgpt.config import Config
from litgpt.convert.resolve import open_checkpoint
from litgpt.errors import UserError
from litgpt.prompts import copy_prompt_style
from litgpt.text import counted
from litgpt.tokenizer import FLAGS, Tokenizer
from litgpt.values import checked

if TYPE_CHECKING:
    from torch import Tensor

LONGEST, MOST = 200, 10_000  # characters of a token, and tokens


@checked
def add_tokens(checkpoint_dir: Path, output_dir: Path, tokens: list[str], *, special: bool = True) -> None:
    """Add tokens to a checkpoint's tokenizer, in a new folder.

    The embedding and the output layer get a row for each token, the mean of the other tokens' rows. The rows must then be trained:
    `litgpt finetune_lora OUTPUT_DIR --modules_to_save wte lm_head`, or finetune_full.

    Args:
        checkpoint_dir: The checkpoint; it stays as it is.
        output_dir: The new folder.
        tokens: Their texts, such as "<tool>" "</tool>".
        special: Add special tokens, which are left out of generated text. false: they are written.
    """
    from litgpt.convert.litgpt import require_finite

    source, target = checkpoint.require_checkpoint(open_checkpoint(checkpoint_dir)), output_dir
    contents = checkpoint.tokenizer_contents(source)
    tokenizer, ids = _extended(source, contents, tokens, special)
    contents["tokenizer.json"] = tokenizer.encode()
    stated = json.loads(contents.get("tokenizer_config.json", "{}"))
    if isinstance(listed := stated.get("added_tokens_decoder"), dict):
        listed |= {str(i): {"content": token, **dict.fromkeys(FLAGS, False), "special": special} for token, i in ids.items()}
        contents["tokenizer_config.json"] = (json.dumps(stated, indent=2, ensure_ascii=False) + "\n").encode()
    config, last = Config.from_checkpoint(source), max(ids.values())
    config = replace(config, vocab_size=max(config.vocab_size, last + 1), padded_vocab_size=max(config.V, last + 1))
    file = source / checkpoint.WEIGHTS
    weights = _grown(checkpoint.load_weights(file), list(ids.values()), config.V)
    require_finite(weights, file)
    with atomic.new_folder(target) as folder:
        checkpoint.write_tokenizer(contents, folder)
        copy_prompt_style(source, folder)
        checkpoint.save_config(config, folder)
        checkpoint.save_weights(weights, folder / checkpoint.WEIGHTS)
    print(f"Added {counted(len(ids), 'token')}, ids {min(ids.values())} to {last}: {target}")
    print(f"Train them: litgpt finetune_lora {shlex.quote(str(target))} --data FILE --modules_to_save wte lm_head")


def _extended(source: Path, contents: dict[str, bytes], tokens: list[str], special: bool) -> tuple[str, dict[str, int]]:
    """Return tokenizer.json with the tokens, and their ids. Raises UserError for tokens that cannot be added."""
    if "tokenizer.json" not in contents:
        raise UserError(f"{source} has no tokenizer.json to add tokens to: convert the model from its Hugging Face folder")
    known = Tokenizer(source)
    if not tokens or len(tokens) > MOST:
        raise UserError(f"tokens: give 1 to {MOST:,} texts, such as --tokens '<tool>' '</tool>'")
    for token in tokens:
        if not token.strip() or len(token) > LONGEST:
            raise UserError(f"tokens has {token[:60]!r}: texts of 1 to {LONGEST} characters are needed")
        if tokens.count(token) > 1 or known.token_to_id(token) is not None:
            raise UserError(
                f"tokens has {token[:60]!r}, which {'is named twice' if tokens.count(token) > 1 else 'the tokenizer has already'}"
            )
    text = known.add(tokens, special)
    return text, {token: i for token in tokens if (i := known.token_to_id(token)) is not None}


def _grown(weights: "dict[str, Tensor]", ids: list[int], rows: int) -> "dict[str, Tensor]":
    """Return the weights with at least `rows` rows of the embedding and the output layer; new ones are the mean of the other tokens'."""
    import torch

    made: dict[int, Tensor] = {}  # a tied head stays the embedding
    for name in ("transformer.wte.weight", "lm_head.weight", "lm_head.bias"):
        if (weight := weights.get(name)) is not None and weight.data_ptr() not in made:
            mean = weight[: min(ids)].float().mean(0, keepdim=True).to(weight.dtype)
            grown = torch.cat((weight, mean.expand(max(0, rows - len(weight)), *weight.shape[1:])))
            grown[ids] = mean
            made[weight.data_ptr()] = grown
    return {name: made.get(weight.data_ptr(), weight) for name, weight in weights.items()}
