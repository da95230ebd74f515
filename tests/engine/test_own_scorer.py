# SPDX-License-Identifier: Apache-2.0
"""A scorer of another package: examples/scorer is installed, stands in --help and serves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fairkv_tests.budgets_reference import ada_kv_kept
from fairkv_tests.engine_process import LAUNCH, ServerProcess
from fairkv_tests.tiny_models import random_prompts

ROOT = Path(__file__).resolve().parents[2]
POWER, WINDOW, RATIO, FLOOR = 3.0, 16, 0.3, 0.1
PROMPTS = random_prompts([40, 300, 700], vocab=500, seed=6)
OPTIONS = [
    *("--fairkv", "--fairkv-scorer", "pnorm", "--fairkv-norm-power", str(POWER)),
    *("--fairkv-window", str(WINDOW), "--fairkv-ratio", str(RATIO)),
    *("--fairkv-floor-alpha", str(FLOOR)),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process that has the example installed."""
    folder = tmp_path_factory.mktemp("own")
    source, target = folder / "source", folder / "installed"
    shutil.copytree(ROOT / "examples" / "scorer", source)  # setuptools writes beside it
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(target), os.getenv("PYTHONPATH")]))}


def _launch(package: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(LAUNCH), *arguments],
        env={**os.environ, **package},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_its_options_stand_in_the_help(package: dict[str, str]) -> None:
    text = " ".join(_launch(package, "--help").stdout.split())
    assert ",pnorm,random,snapkv,streaming,tova}" in text and "pnorm = keys of small p-norm" in text
    assert "--fairkv-norm-power X pnorm: The p of the norm of a key. (default: 2.0)" in text


def test_its_bounds_hold_before_a_model_is_looked_for(package: dict[str, str]) -> None:
    wrong = _launch(package, "--model-path", "none", *OPTIONS, "--fairkv-norm-power", "0")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1] == (
        "error: --fairkv-norm-power: 0 must be greater than 0.0"
    )


def _by_hand(model: Path) -> np.ndarray:
    """Kept tokens ``[L, H]`` of all prompts, from Hugging Face's keys and plain formulae."""
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    kept = []
    for prompt in PROMPTS:
        with torch.no_grad():
            cache = network(torch.tensor([prompt]), use_cache=True).past_key_values
        total = len(prompt)
        budget = max(-(-int(total * RATIO * 1000) // 1000), WINDOW + 1)
        layers = []
        for layer in cache.layers:
            k = layer.keys[0].numpy()[:, : total - WINDOW].astype(np.float64)  # [H, M, D]
            scores = (-((np.abs(k) ** POWER).sum(axis=2) ** (1 / POWER))).tolist()
            heads = list(range(len(scores)))
            rows = ada_kv_kept(scores, heads, budget, WINDOW, FLOOR, total)
            layers.append([len(row) for row in rows])
        kept.append(layers)
    return np.sum(kept, axis=0)


def test_it_serves_at_tp_2(
    package: dict[str, str],
    tiny_model: Callable[..., Path],
    start_server: Callable[..., ServerProcess],
) -> None:
    """Kept tokens of every head are those of the formula, up to scores that tie in float32."""
    model = tiny_model(layers=2, q_heads=8, kv_heads=4)
    flags = ["--model-path", str(model), "--device", "cpu", "--dtype", "float32", "--tp-size", "2"]
    flags += ["--max-total-tokens", "8192", "--chunked-prefill-size", "256"]
    server = start_server([*flags, *OPTIONS], environment={**package, "FAIRKV_CONFIG": ""})
    before = json.loads(server.get("/server_info"))["internal_states"][0]["fairkv"]
    assert before["scorer"] == "pnorm"
    assert before["options"] == {"window": WINDOW, "norm_power": POWER, "floor_alpha": FLOOR}
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    server.post("/generate", {"input_ids": PROMPTS, "sampling_params": sampling})
    state = json.loads(server.get("/server_info"))["internal_states"][0]["fairkv"]
    kept = np.array(state["kept"]["tokens"]) - np.array(before["kept"]["tokens"])
    wanted = _by_hand(model)
    assert kept.sum(axis=1).tolist() == wanted.sum(axis=1).tolist()  # a layer's total is exact
    assert np.abs(kept - wanted).max() <= 1, (kept - wanted).tolist()
    assert len({*wanted.ravel().tolist()}) > 2  # heads do differ
