"""Run LoRA and Skip2-LoRA on the same data, one after the other, and collect what each run measured.

    python evaluate_skip2lora_comparison.py [--model llama-2-7b] [--max_steps 100] [--repeats 3] [--KEY VALUE of litgpt finetune ...]
    python evaluate_skip2lora_comparison.py --runs lora_baseline skip2lora skip2lora_tail "mine=my.yaml --lora_r 4"

Writes OUT_DIR/comparison_results.json, which analyze_results.py reads; each run's logs and adapter are in OUT_DIR/<name>/.
`--help` lists all options; the code is in benchmarks/comparison.py.
"""

import sys

from benchmarks.comparison import main

if __name__ == "__main__":
    sys.exit(main())
