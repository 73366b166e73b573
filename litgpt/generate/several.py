"""`litgpt generate_sequentially` and `generate_tp`: one answer by several devices (`litgpt.generate.divide`), as LitGPT has them."""

import contextlib
import io
import sys
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
    """Answer a prompt with a model whose blocks are divided among GPUs."""

    def main(self) -> None:
        from litgpt.device import find_device
        from litgpt.generate.divide import places, spread

        devices = places(find_device(self.accelerator), self.devices)
        llm = self.opened(self.checkpoint_dir, device="cpu")
        spread(llm.model, devices)
        self.show(llm)


@dataclass
class TensorParallel(Several):
    """Answer a prompt with a model each of whose blocks is divided among processes, started by --devices or torchrun."""

    def main(self) -> None:
        from litgpt.device import default_precision, find_device
        from litgpt.generate.divide import processes, shard
        from litgpt.train.parallel import ends_together

        device = find_device(self.accelerator)
        precision = self.precision or default_precision(device)
        rank = processes(device, self.devices, precision, self.quantize)
        with ends_together(rank), contextlib.ExitStack() as streams:
            if not rank.is_first:
                streams.enter_context(contextlib.redirect_stdout(io.StringIO()))
                streams.enter_context(contextlib.redirect_stderr(io.StringIO()))
            llm = open_model(self.checkpoint_dir, packed=False, precision=precision, device="cpu")
            shard(llm.model, rank.index, rank.size, rank.sum)
            llm.model.to(rank.device)
            if self.compile:
                print("compile: the parts of a model are not compiled by generate_tp", file=sys.stderr)
            self.show(llm)
