"""Requests per second and time to first token of `litgpt serve`, and what each further Skip2-LoRA adapter in a batch costs.

    python -m benchmarks.serve CHECKPOINT [--clients 1 4 16] [--rounds 3] [--new_tokens 32] [--transformers HF_FOLDER] [--json FILE]

Every client asks one question after another through /v1/chat/completions, streamed, and each answer has --new_tokens tokens. With
--transformers the server of transformers answers the same from the same weights (`litgpt convert_from_litgpt`), in turns. The cost of
adapters is measured in one process, without HTTP: 16 answers grow in one batch, and from step to step 0 to 16 different random adapters
take part. It is processor time, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import copy
import http.client
import json
import re
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.process import environment

WORDS = "Explain in a few sentences why the sky is blue and what colour it has on Mars, then name three books about light. "
ADAPTERS = (0, 1, 2, 4, 8, 16)
ROWS, STEPS = 16, 12


@dataclass
class Peer:
    """A server, and the model's name there."""

    name: str
    process: subprocess.Popen[str]
    address: str
    model: str


def start_litgpt(folder: Path) -> Peer:
    words = [sys.executable, "-m", "litgpt", "serve", str(folder), "--port", "0"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"Listening at http://(\S+?):? ", line):
            address = found[1].rstrip(":")
            return Peer("litgpt serve", process, address, json.loads(get(address, "/v1/models"))["data"][0]["id"])
    raise SystemExit("litgpt serve did not start")


def start_transformers(folder: Path, options: list[str]) -> Peer:
    command = Path(sys.executable).with_name("transformers")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [str(command), "serve", str(folder), "--port", str(port), "--device", "cpu", "--dtype", "float32", *options]
    process = subprocess.Popen(words, text=True, env=environment())
    for _ in range(240):
        time.sleep(0.5)
        try:
            get(f"127.0.0.1:{port}", "/health")
        except OSError:
            if process.poll() is not None:
                break
            continue
        return Peer("transformers serve", process, f"127.0.0.1:{port}", str(folder))
    raise SystemExit("transformers serve did not start")


def get(address: str, path: str) -> str:
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("GET", path)
    return connection.getresponse().read().decode()


def ask(peer: Peer, number: int, new_tokens: int) -> tuple[float, float, int]:
    """Return seconds to the first token and to the end, and the number of chunks of an answer."""
    question = f"Question {number}. {WORDS}"
    body = {
        "model": peer.model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": new_tokens,
        "temperature": 0.0,
        "seed": number,
        "stream": True,
        "logit_bias": {"2": -100.0},  # no end before the limit
    }
    if peer.name != "litgpt serve":
        body = {key: value for key, value in body.items() if key not in ("logit_bias", "seed")}
    connection = http.client.HTTPConnection(peer.address, timeout=600)
    start, first, chunks = time.perf_counter(), 0.0, 0
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{peer.name}: {response.status} {response.read()[:300]!r}")
    for line in response:
        if b'"content"' in line and b'"content": ""' not in line and b'"content":""' not in line:
            chunks += 1
            first = first or time.perf_counter() - start
    return first, time.perf_counter() - start, chunks


def load(peer: Peer, clients: int, rounds: int, new_tokens: int) -> dict[str, float]:
    """Return requests and tokens per second and times to the first token of clients that ask at the same time."""

    def client(number: int) -> list[tuple[float, float, int]]:
        return [ask(peer, clients * turn + number, new_tokens) for turn in range(rounds)]

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for found in pool.map(client, range(clients)) for answer in found]
    seconds = time.perf_counter() - start
    firsts = sorted(first for first, _, _ in answers)
    return {
        "requests_per_s": len(answers) / seconds,
        "tokens_per_s": sum(chunks for _, _, chunks in answers) / seconds,
        "first_median_s": statistics.median(firsts),
        "first_worst_s": firsts[-1],
    }


def adapter_costs(folder: Path, taps: int = 6, rank: int = 16) -> tuple[float, dict[int, float]]:
    """Return the median ms of a batch's step with the base alone, and the ms that each number of adapters adds (median of pairs)."""
    import torch

    from litgpt.generate.engine import Row
    from litgpt.generate.sampling import Sampling
    from litgpt.lora import Config, Skip2LoRA
    from litgpt.serve.models import Head, Models

    base = next(iter(Models(folder, {}).values()))
    model: Any = base.llm.model
    settings: dict[str, Any] = {"skip2lora_enabled": True, "lora_r": rank, "skip2lora_block_indices": f"last:{taps}"}
    shared, heads = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}, []
    for _ in range(max(ADAPTERS)):
        adapted = copy.deepcopy(model, shared)
        adapted.adapt(Config(**model.config.base_dict(), **settings))
        for layer in (module for module in adapted.modules() if isinstance(module, Skip2LoRA)):
            torch.nn.init.normal_(layer.lora_B, std=0.01)
        heads.append(Head(adapted.requires_grad_(False).eval()))
    ids = base.llm.tokenizer.ids(WORDS)
    for _ in range(ROWS):
        base.batch.add(Row(list(ids), Sampling(temperature=0.0)))
    for row, logits in base.batch.step():
        base.batch.chunk = None
        row.draw(logits)
    times: dict[int, list[float]] = {count: [] for count in ADAPTERS}
    for step in range(STEPS + 2):
        for count in ADAPTERS:
            for number, row in enumerate(base.batch.rows):
                row.head = heads[number % count] if count else None
            start = time.process_time()
            results = base.batch.step()
            if step > 1:
                times[count].append(time.process_time() - start)
            for row, logits in results:
                row.draw(logits)
    plain = statistics.median(times[0])
    added = {count: statistics.median(a - b for a, b in zip(times[count], times[0], strict=True)) for count in ADAPTERS[1:]}
    return plain * 1e3, {count: value * 1e3 for count, value in added.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint_dir", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--transformers", type=Path)
    parser.add_argument("--options", nargs="*", default=[], help="of transformers serve")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    peers = [start_litgpt(args.checkpoint_dir)]
    try:
        if args.transformers:
            peers.append(start_transformers(args.transformers, args.options))
        print("| server | clients | requests/s | tokens/s | first token, median | worst |\n|---|--:|--:|--:|--:|--:|")
        for peer in peers:
            ask(peer, 0, 4)  # the first request loads what is loaded late
        for clients in args.clients:
            for peer in peers:
                found = results[f"{peer.name}, {clients}"] = load(peer, clients, args.rounds, args.new_tokens)
                cells = (f"{found['requests_per_s']:.2f}", f"{found['tokens_per_s']:.1f}")
                times = (f"{found['first_median_s']:.2f} s", f"{found['first_worst_s']:.2f} s")
                print(f"| {peer.name} | {clients} | {' | '.join((*cells, *times))} |", flush=True)
    finally:
        for peer in peers:
            peer.process.terminate()
    plain, added = adapter_costs(args.checkpoint_dir)
    results["step_ms"], results["adapters_ms"] = plain, added
    print(f"\nA step of {ROWS} answers of the base: {plain:.1f} ms.\n\n| adapters in the batch | added | each, of a step |\n|--:|--:|--:|")
    for count, value in added.items():
        print(f"| {count} | {value:.2f} ms | {value / count / plain:.1%} |")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
