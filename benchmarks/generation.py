"""Measure a token on a CPU: of one stream, of its linear layers alone, and of one reading of the weights; and of several rows in a batch.

    python -m benchmarks.generation CHECKPOINT [--quantize int8] [--precision 32-true] [--tokens 40] [--threads 1]
        [--rows 1 2 4 8 16] [--context 30]

The first three are CPU time of one thread, the best of three, so that other processes on the machine change little. A step of a batch is
wall-clock time with --threads threads, the median of --tokens steps, with the weights plain and packed (`litgpt.packed`): behind prompts of
--context tokens and three more in each further row, which are read before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from litgpt.api import LLM
from litgpt.generate.engine import Batch, Row, Session
from litgpt.generate.sampling import Sampling
from litgpt.model import evaluating
from litgpt.packed import pack
from litgpt.quantize import QuantisedLinear

TEXT = "Once upon a time there was"


def best(work: Callable[[], object], count: int, repeats: int = 3) -> float:
    """Return the least time of work(), in milliseconds, over its `count` parts."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append((time.process_time() - start) / count * 1e3)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--quantize")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--context", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    llm = LLM.load(args.checkpoint, precision=args.precision, quantize=args.quantize)
    ids, session = llm.tokenizer.ids(TEXT), Session(llm.model)

    def answer() -> None:
        for _ in session.answer(list(ids), args.tokens, Sampling(), (), torch.Generator().manual_seed(1)):
            pass

    answer()
    token = best(answer, args.tokens)
    linears = [module for module in llm.model.modules() if isinstance(module, torch.nn.Linear | QuantisedLinear)]
    inputs = [torch.randn(1, linear.in_features, dtype=llm.model.dtype) for linear in linears]

    def products() -> None:
        for _ in range(10):
            for linear, x in zip(linears, inputs, strict=True):
                linear(x)

    with torch.inference_mode():
        products()
        alone = best(products, 10)
    weights = sum(tensor.nbytes for linear in linears for tensor in (*linear.parameters(False), *linear.buffers(False)))
    buffer = torch.ones(weights // 4)
    read = best(buffer.sum, 1, 9)
    print(f"{llm.config.name}, {args.precision}, {args.quantize}: {weights / 1e6:.0f} MB of linear layers")
    print(f"a token {token:.1f} ms; its linear layers {alone:.1f} ms; to read them {read:.1f} ms; ratio {token / read:.2f}")
    torch.set_num_threads(args.threads)
    plain = [batch_step(llm, args.context, rows, args.tokens) for rows in args.rows]
    pack(llm.model)
    for rows, before in zip(args.rows, plain, strict=True):
        packed = batch_step(llm, args.context, rows, args.tokens)
        print(f"a step of {rows} rows behind {args.context} tokens, {args.threads} threads: {before:.1f} ms, packed {packed:.1f} ms")


def batch_step(llm: LLM, context: int, rows: int, tokens: int) -> float:
    """Return the milliseconds of a step behind prompts of `context` tokens and more."""
    batch, generator, times = Batch(llm.model), torch.Generator().manual_seed(0), list[float]()
    for i in range(rows):
        batch.add(Row(torch.randint(llm.config.vocab_size, (context + 3 * i,), generator=generator).tolist(), Sampling(temperature=0.0)))
    with evaluating(llm.model):
        for _ in range(3 + tokens):
            start = time.perf_counter()
            for row, logits in batch.step():
                row.draw(logits)
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[3:])


if __name__ == "__main__":
    main()
