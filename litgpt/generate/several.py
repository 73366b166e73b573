"""`litgpt generate_sequentially` and `generate_tp`: one answer by several devices (`litgpt.generate.divide`), as LitGPT has them."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Union

from litgpt.generate.base import Answers, Checkpoint, open_model


@dataclass
class Several(Answers, Checkpoint):
    """Answers by several devices."""

    devices: Union[int, str] = "auto"
    """Number of devices. auto: all GPUs, or the CPU."""


@dataclass
class Sequentially(Several):
    """Answer a prompt by a model whose blocks are divided among GPUs."""

    def main(self) -> None:
        from litgpt.device import default_device
        from litgpt.generate.divide import places, spread

        devices = places(default_device(), self.devices)
        llm = self.opened(self.checkpoint_dir, device="cpu")
        spread(llm.model, devices)
        self.show(llm)


@dataclass
class TensorParallel(Several):
    """Answer a prompt by a model each of whose blocks is divided among processes, started by --devices or torchrun."""

    def main(self) -> None:
        from litgpt.device import default_device, default_precision
        from litgpt.generate.divide import TIMEOUT, require_plain, shard
        from litgpt.train.parallel import Rank, ends_together

        require_plain(self.quantize)
        precision = self.precision or default_precision(default_device())
        rank = Rank.start(precision, self.devices, 1, TIMEOUT)
        with ends_together(rank), contextlib.nullcontext() if rank.is_first else _silence():
            llm = open_model(self.checkpoint_dir, precision, device="cpu", packed=False)
            shard(llm.model, rank.index, rank.size, rank.sum)
            llm.model.to(rank.device)
            if self.compile:
                print("compile: the parts of a model are not compiled by generate_tp", file=sys.stderr)
            self.show(llm)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
