"""The objectives by their names."""

from typing import Any

from litgpt.objectives.base import Objective
from litgpt.objectives.critic import Critic
from litgpt.objectives.multi_token import MultiToken
from litgpt.objectives.preferences import DPO, KTO, ORPO
from litgpt.objectives.rho1 import Rho1
from litgpt.objectives.verifiable import Verifiable

OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": Objective,
    "dpo": DPO,
    "orpo": ORPO,
    "kto": KTO,
    "rho1": Rho1,
    "critic": Critic,
    "verifiable": Verifiable,
}


def objective_of(settings: Any) -> Objective:
    """Return the objective of a command's settings; next-token prediction if they have none."""
    kind = OBJECTIVES[getattr(settings, "objective", "next_token")]
    return (MultiToken if kind is Objective and getattr(settings, "mtp_heads", 0) > 0 else kind)(settings)
