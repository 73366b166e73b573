"""The settings of what a step minimises. Light: torch is not imported.

The string below each field is its help text on the command line.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional, get_args

from litgpt.args import ABOVE_0, FROM_0, SHARE, Range, require_ranges, setting
from litgpt.errors import UserError
from litgpt.files import expand_path

Preference = Literal["dpo", "orpo", "kto"]
Rating = Literal["critic", "verifiable"]
Name = Literal["next_token", "rho1", Rating, Preference]


@dataclass(kw_only=True)
class ObjectiveSettings:
    """What a step minimises, and its constants."""

    objective: Name = setting("next_token")
    """next_token; rho1: the next token, where a reference model finds it learnable; dpo, orpo or kto: answers that are preferred to others;
    critic or verifiable: answers with a reward. critic trains a value head alone, verifiable trains adapters with it."""
    rho1_reference: Optional[Path] = None
    """A checkpoint or adapter folder: a model that was trained on good data, with the same tokenizer."""
    rho1_keep: float = setting(0.6, Range(0, 1, above=True), varies=True)
    """The share of the tokens of each global batch that is trained: those with the largest loss above the reference's."""
    dpo_beta: float = setting(0.1, ABOVE_0, varies=True)
    """How strongly DPO keeps the model near the base: lower lets it move further."""
    dpo_label_smoothing: float = setting(0.0, Range(0, 0.5, below=True), varies=True)
    """The share of pairs, below 0.5, that DPO assumes to be labelled the wrong way round."""
    dpo_length_normalised: bool = setting(False, varies=True)
    """Divide DPO's log-ratio of each answer by its number of tokens. dpo_beta should then be higher by about that factor."""
    dpo_nll_weight: float = setting(0.0, FROM_0, varies=True)
    """The weight of the preferred answer's loss per token, beside DPO's. With 0, pairs that are easy to tell apart soon break the model."""
    orpo_lambda: float = setting(0.1, FROM_0, varies=True)
    """The weight of ORPO's odds ratio relative to the loss of the preferred answer."""
    kto_beta: float = setting(0.1, ABOVE_0, varies=True)
    """The same as dpo_beta, for KTO."""
    kto_desirable_weight: float = setting(1.0, FROM_0, varies=True)
    """Factor of KTO's loss for good answers."""
    kto_undesirable_weight: float = setting(1.0, FROM_0, varies=True)
    """Factor of KTO's loss for bad answers."""
    mtp_weight: float = setting(0.3, FROM_0, varies=True)
    """The weight of the multi-token heads' mean loss (mtp_heads) relative to the next token's, if adapters are trained too."""
    critic_lambda: float = setting(1.0, SHARE, varies=True)
    """The target of a critic's value: 1 is the answer's reward; below 1, it is mixed with the values of the tokens that follow (TD)."""
    verifiable_beta: float = setting(1.0, FROM_0, varies=True)
    """How strongly objective verifiable favours tokens that raised the value. 0: it learns all tokens of a right answer alike."""
    verifiable_cap: float = setting(2.0, ABOVE_0, varies=True)
    """The largest factor of a token's loss."""

    def __post_init__(self) -> None:
        require_ranges(self)
        if self.objective in get_args(Rating) and not hasattr(self, "value_head"):
            raise UserError(f"objective {self.objective} trains a value head, which finetune_lora adds: use `litgpt finetune_lora`")
        if self.objective == "rho1" and self.rho1_reference is None:
            raise UserError(
                "rho1_reference is missing: objective rho1 compares with a model that was trained on good data; name its folder"
            )
        if self.rho1_reference is not None:
            self.rho1_reference = expand_path(self.rho1_reference)
