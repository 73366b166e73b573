"""The five-minute benchmark: LoRA and Skip2-LoRA side by side on this machine.

    python benchmark_skip2lora.py [--model NAME_OR_FOLDER] [--batch_size B] [--seq_length T] ...
    python benchmark_skip2lora.py --model Llama-2-7b-hf --count_only

Prints parameters, forward, backward and step times, and memory of each configuration, then a comparison. Writes
out/benchmark/benchmark_results.json. `--help` lists all options; the code is in benchmarks/steps.py.
"""

import sys

from benchmarks.steps import main

if __name__ == "__main__":
    sys.exit(main())
