# SPDX-License-Identifier: Apache-2.0
"""Measure the demo model's head profile: fresh recall prompts through ``fairkv profile``."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from demo.prompts import make_prompts  # noqa: E402
from fairkv_sglang.cli.main import main  # noqa: E402

SEED = 900_000  # a fresh seed of its own: neither evaluation, tests nor demo use it
MIX = ((512, 4), (1024, 1), (1024, 8), (1500, 8))  # (tokens, facts)
PER_KIND = 16


def measure() -> int:
    """Write ``demo/profile.json`` and ``docs/images/demo-profile.png``; returns the exit status."""
    prompts = [
        prompt
        for tokens, facts in MIX
        for prompt in make_prompts(seed=SEED, count=PER_KIND, tokens=tokens, facts=facts)
    ]
    picture = ROOT / "docs" / "images" / "demo-profile.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)  # the profile names the model by the path that is given here
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        lines = [json.dumps({"input_ids": prompt.token_ids}) for prompt in prompts]
        file.write_text("\n".join(lines), encoding="utf-8")
        return main(
            [
                "profile",
                "--model-path",
                "demo/model",
                "--prompts",
                str(file),
                "--out",
                "demo/profile.json",
                "--plot",
                str(picture),
            ]
        )


if __name__ == "__main__":
    sys.exit(measure())
