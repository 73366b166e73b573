"""`litgpt generate_speculatively`: a small model drafts tokens, and a large one checks several in one pass (`litgpt.generate.drafts`)."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.args import POSITIVE, setting
from litgpt.generate.base import Answers


@dataclass
class Models:
    """The model that answers and the one that drafts."""

    draft_model_checkpoint_dir: Path
    """Folder of the small model."""
    target_model_checkpoint_dir: Path
    """Folder of the large model, whose answers these are."""


@dataclass
class Speculatively(Answers, Models):
    """Answer a prompt with a large model, faster by a small model of the same vocabulary that drafts its tokens."""

    speculative_k: int = setting(3, POSITIVE)
    """Tokens that the small model drafts at a time."""

    def main(self) -> None:
        draft, target = (self.opened(folder) for folder in (self.draft_model_checkpoint_dir, self.target_model_checkpoint_dir))
        self.show(target, self.speculative_k, draft.model)
