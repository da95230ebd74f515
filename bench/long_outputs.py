# SPDX-License-Identifier: Apache-2.0
"""``python -m fairkv_sglang.bench.long_outputs``: what compressing outputs costs in answers.

The small model's own task, with most of the text in the output: the first 256 of 1,024 tokens of
notes are the prompt, the others are forced as output tokens, one decode step each, and then a
question: about a code that stood in the prompt (early), or in the last 256 tokens (recent). An
answer is right if all four numbers and the end of sequence are. Each budget is served with all of
the output kept and with outputs compressed, in each way. Rows that the file has already are not
measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fairkv_sglang.bench.stats import machine, write
from fairkv_sglang.cli.output import print_table
from fairkv_sglang.evaluation.client import FORCED, PROCESSOR
from fairkv_sglang.evaluation.statistics import wilson

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # behind everything else; `demo` is a folder of the checkout
from demo.models import MODELS  # type: ignore[import-not-found]  # noqa: E402
from demo.prompts import draw_facts, make_notes  # type: ignore[import-not-found]  # noqa: E402
from demo.vocabulary import EOS_ID  # type: ignore[import-not-found]  # noqa: E402

TOKENS, PART, FACTS = 1024, 256, 8
COMPRESSED: dict[str, Any] = {"decode_compression": True, "decode_slack": 64}
WAYS: dict[str, dict[str, Any]] = {
    "kept": {},
    "keydiff": COMPRESSED,
    "attention": {**COMPRESSED, "decode_scorer": "attention"},
    "redundancy": {**COMPRESSED, "decode_scorer": "attention", "decode_redundancy": 0.9},
}
NAME = "long-outputs-small"
KINDS = ("early", "recent")


class Question(NamedTuple):
    """A prompt, the output that is forced, and the answer that has to follow it."""

    kind: str
    prompt: list[int]
    forced: list[int]
    answer: list[int]


def questions(number: int) -> list[Question]:
    """One of each kind about the same text."""
    rng = random.Random(f"long outputs {number}")
    while True:
        notes = make_notes(rng, TOKENS, draw_facts(rng, FACTS))
        found: dict[str, Any] = {}
        for fact in notes.facts:
            said, ids = fact.statement(), notes.token_ids
            place = next(i for i in range(TOKENS) if ids[i : i + len(said)] == said)
            if place + len(said) <= PART:
                found["early"] = fact
            elif place >= TOKENS - PART:
                found["recent"] = fact
        if len(found) == len(KINDS):
            break
    prompt, rest = notes.token_ids[:PART], notes.token_ids[PART:]
    return [
        Question(kind, prompt, [*rest, *found[kind].question()], [*found[kind].code, EOS_ID])
        for kind in KINDS
    ]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budgets", default="256,128", help="default: %(default)s")
    parser.add_argument("--scope", default="layer", help="default: %(default)s")
    parser.add_argument("--ways", default=",".join(WAYS), help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=24, help="texts; default: %(default)s")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    args = parser.parse_args()
    asked = [question for i in range(args.samples) for question in questions(i)]
    file = args.out / f"{NAME}.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    for budget in map(int, args.budgets.split(",")):
        for way in args.ways.split(","):
            head = {"budget": budget, "scope": args.scope, "outputs": way, "texts": args.samples}
            if any(head.items() <= row.items() for row in rows):
                continue
            # Prompts above the budget lose nothing that only a question would have asked for.
            options = {"budget": budget, "scope": args.scope, "scorer": "keydiff", **WAYS[way]}
            rows.append({**head, **measure(options, asked)})
            write({"machine": machine("cpu"), "rows": rows}, args.out, NAME)
            print(rows[-1], file=sys.stderr, flush=True)
    rows.sort(key=lambda row: (-row["budget"], list(WAYS).index(row["outputs"])))
    print_table("Right answers", list(rows[0]), [list(row.values()) for row in rows])
    return 0


def measure(fairkv: dict[str, Any], asked: list[Question]) -> dict[str, Any]:
    """Right answers of each kind, and the most head pages that a request held."""
    with engine(fairkv) as running:
        results = running.generate(
            input_ids=[question.prompt for question in asked],
            sampling_params=[
                {
                    "temperature": 0,
                    "ignore_eos": True,
                    "max_new_tokens": len(question.forced) + len(question.answer),
                    "custom_params": {FORCED: question.forced},
                }
                for question in asked
            ],
            custom_logit_processor=[PROCESSOR] * len(asked),
        )
        rank = running.get_server_info()["internal_states"][0]["fairkv"]["ranks"][0]
    row: dict[str, Any] = {}
    for kind in KINDS:
        right = [
            result["output_ids"] == question.forced + question.answer
            for question, result in zip(asked, results, strict=True)
            if question.kind == kind
        ]
        low, high = wilson(sum(right), len(right))
        row[kind] = f"{sum(right)} of {len(right)} [{low:.0%}..{high:.0%}]"
    row["pages"] = rank["peak_pages_charged"] // rank["peak_requests"]
    return row


@contextlib.contextmanager
def engine(fairkv: dict[str, Any]) -> Iterator[Any]:
    """One rank, memory for all requests at once."""
    from fairkv_sglang import Engine

    made = Engine(
        fairkv={"prefill_pool": 8192, **fairkv},
        model_path=str(MODELS["small"].folder()),
        device="cpu",
        dtype="float32",
        max_total_tokens=90_000,
        skip_tokenizer_init=True,
        enable_custom_logit_processor=True,
        log_level="warning",
    )
    try:
        yield made
    finally:
        made.shutdown()


if __name__ == "__main__":
    sys.exit(main())
