# SPDX-License-Identifier: Apache-2.0
"""Exact match of the demo model with the full cache: ``python demo/evaluate.py``.

The reference is transformers' ``LlamaForCausalLM`` in float32 with greedy decoding.  An answer
counts only if all numbers of the code are right and ``</s>`` follows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

# Behind everything else: the folder `kernels/` must not be taken for the package of that name.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from demo.prompts import RecallPrompt, is_exact, make_prompts

HERE = Path(__file__).resolve().parent
#: Any seed below ``FIRST_TRAINING_SEED`` gives prompts that training has not seen.
DEFAULT_SEED = 20_000


@dataclass(frozen=True)
class Result:
    """Exact match at one prompt length and number of facts."""

    tokens: int
    facts: int
    seed: int
    prompts: int
    exact: int
    exact_match: float
    seconds: float


def generate(model: PreTrainedModel, prompts: list[RecallPrompt], steps: int) -> list[list[int]]:
    """``steps`` greedy tokens for each prompt; all prompts must have the same length."""
    ids = torch.tensor([prompt.token_ids for prompt in prompts])
    cache = None
    columns = []
    with torch.inference_mode():
        for _ in range(steps):
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            ids = output.logits[:, -1:].argmax(dim=-1)
            columns.append(ids)
    return torch.cat(columns, dim=1).tolist()


def evaluate(
    model: PreTrainedModel, tokens: int, facts: int, count: int, seed: int, rows: int
) -> Result:
    """Measure ``count`` fresh prompts, ``rows`` at a time."""
    begun = time.perf_counter()
    prompts = make_prompts(seed, count, tokens, facts)
    exact = 0
    for start in tqdm(range(0, count, rows), desc=f"{tokens} tokens, {facts} facts", leave=False):
        part = prompts[start : start + rows]
        answers = generate(model, part, len(part[0].answer_ids) + 1)
        exact += sum(is_exact(prompt, ids) for prompt, ids in zip(part, answers, strict=True))
    seconds = round(time.perf_counter() - begun, 1)
    return Result(tokens, facts, seed, count, exact, round(exact / count, 4), seconds)


def check_round_trip(folder: Path) -> None:
    """Raise unless the tokenizer gives a prompt's ids for its text and the text for its ids."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in make_prompts(DEFAULT_SEED, 4, 1024, 8):
        if tokenizer(prompt.text).input_ids != prompt.token_ids:
            raise RuntimeError("the tokenizer does not read a prompt back as its own tokens")
        if tokenizer.decode(prompt.token_ids) != prompt.text:
            raise RuntimeError("the tokenizer does not write a prompt's tokens as its text")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2000])
    parser.add_argument("--facts", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--prompts", type=int, default=200, help="prompts per length and facts")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED)
    parser.add_argument("--rows", type=int, default=4, help="prompts decoded together")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=HERE / "evaluation.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    check_round_trip(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    table = Table("tokens", "facts", "prompts", "exact match", "seconds")
    results = []
    for tokens in args.tokens:
        for facts in args.facts:
            result = evaluate(model, tokens, facts, args.prompts, args.seed, args.rows)
            results.append(asdict(result))
            table.add_row(
                str(tokens),
                str(facts),
                str(result.prompts),
                f"{result.exact_match:.1%}",
                str(result.seconds),
            )
            # Written after each line, so that an interrupted evaluation keeps what it measured.
            args.json.write_text(json.dumps(results, indent=2) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
