# SPDX-License-Identifier: Apache-2.0
"""Train the demo model on one CPU core: ``python demo/train.py --out demo/model``.

Runs the stages of ``demo.curriculum`` one after the other, writes a log line per interval and a
resumable checkpoint per stage, and at the end the model in Hugging Face's layout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.curriculum import NO_LOSS, STAGES, Batch, Stage, make_batch
from demo.export import export_model
from demo.model import ModelSize, RecallModel
from demo.vocabulary import TOKENS

LOG_EVERY = 10
WARM_UP_STEPS = 100


class Trainer:
    """Model, optimiser and log of one run."""

    def __init__(self, seed: int, log_path: Path, checkpoint: Path) -> None:
        torch.manual_seed(seed)
        self.seed = seed
        self.log_path = log_path
        self.checkpoint = checkpoint
        self.model = RecallModel(ModelSize(vocab_size=len(TOKENS)))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )
        self.step = 0
        self.elapsed = 0.0
        self.finished: list[str] = []
        #: Steps already done of the first stage that is not finished.
        self.stage_step = 0

    def save(self) -> None:
        """Write everything that a later call needs to go on."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed": self.elapsed,
            "finished": self.finished,
            "stage_step": self.stage_step,
        }
        torch.save(state, self.checkpoint)

    def load(self) -> None:
        """Go on from the checkpoint."""
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.finished, self.stage_step = state["finished"], state["stage_step"]

    def learn(self, batch: Batch, lr: float, far_price: float) -> tuple[float, int, int, int, int]:
        """One optimiser step; returns loss and right/all counts of answers and of repeats."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * min(1.0, (self.step + 1) / WARM_UP_STEPS)
        where = batch.labels != NO_LOSS
        labels = batch.labels[where]
        with torch.autocast("cpu", torch.bfloat16):
            logits, price = self.model(batch.ids, batch.positions, where, far_price)
        loss = functional.cross_entropy(logits.float(), labels)
        self.optimizer.zero_grad(set_to_none=True)
        (loss + price).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        right = logits.argmax(dim=-1) == labels
        answers = batch.is_answer[where]
        return (
            loss.item() + price.item(),
            int(right[answers].sum()),
            int(answers.sum()),
            int(right[~answers].sum()),
            int((~answers).sum()),
        )

    def run(self, stage: Stage) -> None:
        """Train one stage, or the rest of it, and save at every interval."""
        begun = time.perf_counter() - self.elapsed
        sums = [0.0] * 5
        bar = tqdm(total=stage.steps, initial=self.stage_step, desc=stage.name, mininterval=5)
        with bar:
            for index in range(self.stage_step, stage.steps):
                lr = stage.lr_first + (stage.lr_last - stage.lr_first) * index / stage.steps
                values = self.learn(make_batch(stage, self.seed, index), lr, stage.far_price)
                sums = [total + value for total, value in zip(sums, values, strict=True)]
                bar.update()
                if (index + 1) % LOG_EVERY:
                    continue
                self.elapsed = time.perf_counter() - begun
                accuracy = sums[1] / max(sums[2], 1)
                entry = {
                    "step": self.step,
                    "stage": stage.name,
                    "length": stage.length,
                    "loss": round(sums[0] / LOG_EVERY, 4),
                    "accuracy": round(accuracy, 4),
                    "repeat_accuracy": round(sums[3] / max(sums[4], 1), 4),
                    "elapsed": round(self.elapsed, 1),
                }
                sums = [0.0] * 5
                with self.log_path.open("a") as log:
                    log.write(json.dumps(entry) + "\n")
                bar.set_postfix(loss=entry["loss"], accuracy=entry["accuracy"])
                self.stage_step = index + 1
                self.save()
        self.finished.append(stage.name)
        self.stage_step = 0
        self.save()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--log", type=Path, default=Path(__file__).parent / "train_log.jsonl")
    parser.add_argument("--checkpoint", type=Path, help="default: OUT with the suffix .pt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    trainer = Trainer(args.seed, args.log, args.checkpoint or args.out.with_suffix(".pt"))
    if args.resume:
        trainer.load()
    else:
        args.log.unlink(missing_ok=True)
    for stage in STAGES:
        if stage.name not in trainer.finished:
            trainer.run(stage)
    export_model(trainer.model, args.out)


if __name__ == "__main__":
    main()
