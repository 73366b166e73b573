"""PEFT's LoRA and transformers' Trainer on one's own records: facts_with_peft.py RUN, a JSON object.

What a careful user of PEFT does: every linear layer, loss on the replies alone, the model's own chat template, batches padded on the right.
It prints a JSON object: the answers, and the seconds from the start of the process to the end of training.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

began = time.perf_counter()

import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from stored import Samples, collate  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed  # noqa: E402
from with_peft import arguments_of  # noqa: E402


def prompt_of(tokenizer: Any, question: str) -> list[int]:
    """Return the token ids of the question in the chat template, with the assistant's header."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def samples(tokenizer: Any, file: str) -> Samples:
    """Return the records of a JSON lines file: the loss is on the reply and the token that ends it."""
    found = []
    for line in Path(file).read_text().splitlines():
        record = json.loads(line)
        prompt = prompt_of(tokenizer, record["instruction"])
        reply = tokenizer(record["output"])["input_ids"] + [tokenizer.eos_token_id]
        found.append({"input_ids": prompt + reply, "loss_mask": [0] * len(prompt) + [1] * len(reply)})
    return Samples(found)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str, tokens: int) -> str:
    """Return the greedy answer of at most `tokens` tokens."""
    prompt = torch.tensor([prompt_of(tokenizer, question)])
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)


def main(run: dict[str, Any]) -> None:
    set_seed(run["seed"])
    tokenizer = AutoTokenizer.from_pretrained(run["checkpoint"])
    base = AutoModelForCausalLM.from_pretrained(run["checkpoint"], dtype=torch.float32)
    settings = LoraConfig(r=run["r"], lora_alpha=run["r"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    Trainer(model, arguments_of(run, save_strategy="no"), collate, samples(tokenizer, run["data"])).train()
    seconds = time.perf_counter() - began
    model.eval()
    answers = [answer(model, tokenizer, question, run["answer_tokens"]) for question in run["questions"]]
    print(json.dumps({"seconds": seconds, "answers": answers}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
