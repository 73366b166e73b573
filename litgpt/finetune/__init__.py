"""The commands that fine-tune a model. Light, so that the command line answers before torch is loaded."""

from dataclasses import dataclass

from litgpt.errors import UserError
from litgpt.objectives.settings import ObjectiveSettings
from litgpt.train.settings import Run


@dataclass(kw_only=True)
class Finetuning(ObjectiveSettings, Run):
    """The settings of every command that fine-tunes a model."""

    def __post_init__(self) -> None:
        Run.__post_init__(self)
        ObjectiveSettings.__post_init__(self)
        if self.train.tie_embeddings is not None and self.kind != "full":
            raise UserError("train.tie_embeddings is for finetune_full: adapters leave the embedding as it is")

    def main(self) -> None:
        from litgpt.train.run import run

        run(self, self.method())
