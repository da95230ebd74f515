# SPDX-License-Identifier: Apache-2.0
"""Measure a demo model's head profile: fresh prompts through ``fairkv profile``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from demo.models import MODELS  # noqa: E402
from fairkv_sglang.cli.main import main  # noqa: E402

SEED = 900_000  # a fresh seed of its own: neither evaluation, tests nor demo use it
MIX = {  # (tokens, facts)
    "small": ((512, 4), (1024, 1), (1024, 8), (1500, 8)),
    "smollm2": ((512, 4), (1024, 1), (1024, 4), (1500, 4)),
}
PICTURES = {"small": "demo-profile.png", "smollm2": "smollm2-profile.png"}
FLAGS: dict[str, list[str]] = {"small": [], "smollm2": ["--dtype", "float32"]}
PER_KIND = {"small": 16, "smollm2": 4}


def measure(name: str) -> int:
    """Write the model's profile in ``demo/`` and its picture; returns the exit status."""
    model = MODELS[name]
    folder = model.folder()
    prompts = [
        prompt
        for tokens, facts in MIX[name]
        for prompt in model.questions(folder, SEED, PER_KIND[name], tokens, facts)
    ]
    pictures = ROOT / "docs" / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        file = Path(work) / "prompts.jsonl"
        lines = [json.dumps({"input_ids": prompt.input_ids}) for prompt in prompts]
        file.write_text("\n".join(lines), encoding="utf-8")
        # The profile names the model by the path that is given here.
        os.chdir(ROOT if ROOT in folder.parents else folder.parent)
        return main(
            [
                "profile",
                "--model-path",
                str(folder.relative_to(Path.cwd())),
                "--prompts",
                str(file),
                "--out",
                str(model.profile),
                "--plot",
                str(pictures / PICTURES[name]),
                *FLAGS[name],
            ]
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="small")
    sys.exit(measure(parser.parse_args().model))
