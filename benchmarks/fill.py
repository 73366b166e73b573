"""Seconds to fill an activation cache on disk, by one process and by several that fill it together.

    python -m benchmarks.fill CHECKPOINT --processes 1 2

The weights are random, each process has one thread, and none begins before all have their model. Where other work keeps the machine busy,
CPU seconds count: the largest share of them is the time that a process with a core of its own would take.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

from litgpt.text import text_table


def fill(checkpoint: Path, folder: str, samples: int, tokens: int, begin: Any, results: Any) -> None:
    """Fill the cache with others, and report seconds and CPU seconds of this process."""
    import torch

    from litgpt.activations.cache import CacheSettings, activations
    from litgpt.lora import Config
    from litgpt.sample import Sample

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Config.from_checkpoint(checkpoint, lora_r=4, skip2lora_enabled=True).make_model()
    drawn = torch.randint(model.config.vocab_size, (samples, tokens + 1), generator=torch.Generator().manual_seed(0)).tolist()
    records = [Sample(array("i", ids), bytearray([0] * (tokens // 2) + [1] * (tokens + 1 - tokens // 2))) for ids in drawn]
    begin.wait()
    wall, cpu = time.perf_counter(), time.process_time()
    activations(model, records, range(samples), "training", CacheSettings("disk", Path(folder), torch.float32), torch.device("cpu"))
    results.put((time.perf_counter() - wall, time.process_time() - cpu))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    given = parser.parse_args()
    context, rows = multiprocessing.get_context("spawn"), [("processes", "seconds", "CPU seconds of each")]
    for processes in given.processes:
        with tempfile.TemporaryDirectory() as folder:
            begin, results = context.Barrier(processes), context.Queue()
            job = (given.checkpoint, folder, given.samples, given.tokens, begin, results)
            workers = [context.Process(target=fill, args=job) for _ in range(processes)]
            for worker in workers:
                worker.start()
            taken = [results.get(timeout=3600) for _ in workers]
            rows.append((str(processes), f"{max(wall for wall, _ in taken):.1f}", ", ".join(f"{cpu:.1f}" for _, cpu in taken)))
    print(text_table(rows))


if __name__ == "__main__":
    main()
