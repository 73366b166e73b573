"""Learning from answers that are preferred to others: DPO (arXiv 2305.18290), ORPO (arXiv 2403.07691), KTO (arXiv 2402.01306).

log p is the sum of an answer's log-probabilities, n its number of tokens, r = log p - log p of the base model. In a pair, c is the chosen
and d the rejected answer; s is the logistic function, z the logit of the preference:

    DPO    -(1 - e) log s(z) - e log s(-z) - a log p_c / n_c,  z = beta (r_c - r_d)     with length normalisation r / n in place of r
    ORPO   -log p_c / n_c - lambda log s(z),  z = logit p_c - logit p_d,  logit of the mean probability exp(log p / n) of a token
    KTO    v (1 - s(z)),  z = beta (r - z_0) for a good answer, beta (z_0 - r) for a bad one

DPO's a is 0 in its paper. With a > 0 (arXiv 2404.19733) the preferred answers stay probable, which z alone does not ask for.
KTO's z_0 >= 0 is the mean of r over the global batch's prompts with the answers of other prompts, without gradient. A record's weight
multiplies the loss of its units; a batch's loss is the weighted mean over its units.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from litgpt.data.base import Unit
from litgpt.data.records import Record
from litgpt.errors import UserError
from litgpt.objectives.base import ACCURACY, Objective, View
from litgpt.sample import Sample

ROUNDING = 1e-4  # of a logit, before anything is trained
PARTS = ("training", "validation")


class Preferences(Objective):
    """Units of two samples. Subclasses define the loss of a unit."""

    group = 2
    of_answers = True
    is_token_mean = False
    columns = (ACCURACY,)

    def units(self, records: Sequence[tuple[int, Record]]) -> list[Unit]:
        """The chosen and the rejected answer of each record."""
        self.require_whole(records)
        units = []
        for number, record in records:
            if record.rejected is None:
                raise UserError(f"objective {self.settings.objective}: record {number} has no 'chosen' and 'rejected' answers")
            units.append((number, [record, record.rejected]))
        return units

    def require_whole(self, records: Sequence[tuple[int, Record]]) -> None:
        """Raise UserError for weights of single tokens: the losses are of whole answers."""
        for number, record in records:
            if record.token_weights is not None:
                raise UserError(
                    f"objective {self.settings.objective}: record {number} has 'token_weights', and answers are compared as a whole: "
                    "leave them out, or give the record a 'weight'"
                )

    def loss(self, view: View, indices: Sequence[int]) -> torch.Tensor:
        losses, logits = self.of(view, indices)  # (units,) each
        weights = self._weights(view, indices).to(losses)
        if not view.model.training:
            self.tally += torch.stack(((weights * (logits > ROUNDING)).sum(), weights.sum())).to(self.tally)
        auxiliary = view.model.auxiliary_loss()
        return (losses * weights).sum() + (0.0 if auxiliary is None else weights.sum() * auxiliary)

    def of(self, view: View, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss and the logit z of each unit."""
        raise NotImplementedError

    def weight(self, view: View, indices: Sequence[int]) -> float:
        return self._weights(view, indices).sum().item()

    def _weights(self, view: View, indices: Sequence[int]) -> torch.Tensor:
        """(units,): a unit has the weight of its first answer"""
        return torch.tensor([1.0 if s.weights is None else max(s.weights) for s in view.samples(indices[:: self.group])])


def log_probabilities(view: View, indices: Sequence[int], losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each sample's answer and its number of tokens, (samples,) each."""
    counts = [sample.n_targets for sample in view.samples(indices)]
    return -torch.stack([part.sum() for part in losses.split(counts)]), torch.tensor(counts, device=losses.device)


def log_ratios(view: View, indices: Sequence[int], losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return r of each sample, its log p and its number of tokens, (samples,) each."""
    logps, counts = log_probabilities(view, indices, losses)
    base = torch.tensor([-sum(sample.reference or ()) for sample in view.samples(indices)])
    return logps - base.to(logps), logps, counts


class DPO(Preferences):
    """Direct preference optimisation."""

    referred = PARTS

    def of(self, view: View, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        r, logps, n = log_ratios(view, indices, view.losses(indices))
        if self.settings.dpo_length_normalised:
            r = r / n
        z = self.settings.dpo_beta * (r[::2] - r[1::2])
        e = self.settings.dpo_label_smoothing
        mean = (logps / n)[::2]
        return -(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z) - self.settings.dpo_nll_weight * mean, z


class ORPO(Preferences):
    """Odds-ratio preference optimisation: no reference model."""

    def of(self, view: View, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        logps, n = log_probabilities(view, indices, view.losses(indices))
        mean = (logps / n).clamp(max=-1e-6)  # at probability 1 the odds are infinite
        logit = mean - torch.log(-torch.expm1(mean))
        z = logit[::2] - logit[1::2]
        return -mean[::2] - self.settings.orpo_lambda * F.logsigmoid(z), z


class KTO(Preferences):
    """Kahneman-Tversky optimisation. A unit is an answer with a label, and the same prompt with the answer of another record."""

    referred = PARTS
    z_0 = 0.0

    def units(self, records: Sequence[tuple[int, Record]]) -> list[Unit]:
        self.require_whole(records)
        answers: list[tuple[int, Record]] = []
        for number, record in records:
            if record.rejected is not None:
                answers += [(number, replace(record, label=True)), (number, replace(record.rejected, label=False))]
            elif record.label is None:
                raise UserError(f"objective kto: record {number} has no 'label' (true or false), and no 'chosen' and 'rejected' answers")
            else:
                answers.append((number, replace(record, unread=tuple(key for key in record.unread if key != "label"))))
        step = 2 if records and all(record.rejected is not None for _, record in records) else 1  # not another answer to the same prompt
        learned = [each for each in answers if each[1].has_answer]
        others = learned[step:] + learned[:step]
        units = [(number, [own, _with_answer(own, other)]) for (number, own), (_, other) in zip(learned, others, strict=True)]
        return units + [(number, [own]) for number, own in answers if not own.has_answer]  # which are dropped, and counted

    def check(self, train: Sequence[Sample], val: Sequence[Sample], source: str) -> None:
        labels = {sample.label for sample in train[::2]}
        keys = [f"kto_{'' if label else 'un'}desirable_weight" for label in sorted(labels)]
        if not any(getattr(self.settings, key) for key in keys):
            raise UserError(f"{source}: nothing would be trained, as {' and '.join(keys)} {'is' if len(keys) == 1 else 'are'} 0: raise one")

    def begin(self, view: View, indices: Sequence[int], rank: Any) -> None:
        others = indices[1::2]
        losses = view.measured(others, rank.agreed)
        r = log_ratios(view, others, losses)[0] if others else losses
        sums = torch.tensor([r.sum().item(), len(others)], dtype=torch.float64).to(rank.device)
        total, count = rank.sum(sums).tolist()
        self.z_0 = max(0.0, total / max(count, 1))

    def of(self, view: View, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        own = indices[::2]
        r = log_ratios(view, own, view.losses(own))[0]
        good = torch.tensor([sample.label for sample in view.samples(own)], device=r.device)
        z = self.settings.kto_beta * torch.where(good, r - self.z_0, self.z_0 - r)
        v = torch.where(good, self.settings.kto_desirable_weight, self.settings.kto_undesirable_weight)
        return v * (1 - torch.sigmoid(z)), z


def _with_answer(record: Record, other: Record) -> Record:
    """Return the prompt of one record with the answer of another."""
    start, begin = (next((i for i, w in enumerate(r.learned) if w), len(r.learned)) for r in (record, other))
    return replace(
        record, messages=record.messages[:start] + other.messages[begin:], learned=record.learned[:start] + other.learned[begin:]
    )
