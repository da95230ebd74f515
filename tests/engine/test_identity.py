# SPDX-License-Identifier: Apache-2.0
"""With budgets at or above the prompt length FairKV gives stock SGLang's tokens, for any placement.

Greedy, float32, a batch of 16 prompts of 1 to 2,000 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_process import EngineProcess
from sweep_report import SweepReport
from tiny_models import hugging_face_outputs
from workloads import BATCH, ENGINE, LENGTHS, MODEL, NEW_TOKENS, write_plan

FULL = {"ratio": 1.0}


def _outputs(engine: EngineProcess, plan: str) -> list[list[int]]:
    """Tokens of the batch, twice (the second time from the prefix cache), and what must be on."""
    outputs = engine.generate(BATCH, NEW_TOKENS)
    assert engine.generate(BATCH, NEW_TOKENS) == outputs
    state = engine.fairkv()
    assert state["placement"].startswith(plan)
    assert [rank["handed_over_tokens"] for rank in state["ranks"]] == (
        [2 * sum(LENGTHS)] * len(state["ranks"])
    )
    return outputs


def _plan(folder: Path, tp_size: int, placement: str | int) -> dict[str, Any]:
    """FairKV's options for a policy, or for the random placement of a seed."""
    if isinstance(placement, int):
        return {**FULL, "plan": write_plan(folder, tp_size, placement)}
    return {**FULL, "placement": placement}


@pytest.mark.parametrize(
    ("tp_size", "placement"), [(1, "fair_copying"), (2, 1), (4, 2)], ids=["tp1", "tp2", "tp4"]
)
def test_llama_equals_stock(
    stock: Callable[[str], Any], tmp_path: Path, tp_size: int, placement: str | int
) -> None:
    """TP 2 and 4 with uneven, permuted and copied heads."""
    reference = stock("llama")
    engine = EngineProcess(
        reference.model,
        tmp_path / "log",
        fairkv=_plan(tmp_path, tp_size, placement),
        tp_size=tp_size,
        **ENGINE,
    )
    try:
        assert _outputs(engine, str(placement) if tp_size == 1 else "random") == reference.outputs
    finally:
        engine.close()


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral"])
def test_other_architectures_equal_the_model_itself(
    tiny_model: Callable[..., Path], tmp_path: Path, architecture: str
) -> None:
    """Biases (Qwen2), q/k norms (Qwen3), at TP 2 with a random placement, against transformers.

    Mistral is started as a user of stock SGLang would: plain ``sglang.Engine`` with a file named in
    the environment.
    """
    model = tiny_model(architecture=architecture, **MODEL)
    options = _plan(tmp_path, 2, 3)
    start: dict[str, Any] = {"fairkv": options}
    if architecture == "mistral":
        file = tmp_path / "fairkv.yaml"
        file.write_text(f"ratio: 1.0\nplan: {options['plan']}\n")
        start = {"environment": {"FAIRKV_CONFIG": str(file)}}
    engine = EngineProcess(model, tmp_path / "log", tp_size=2, **start, **ENGINE)
    try:
        outputs = _outputs(engine, "random")
    finally:
        engine.close()
    assert outputs == hugging_face_outputs(model, BATCH, NEW_TOKENS)


POLICIES = ("contiguous", "best_effort", "fair_copying", "equal_shares")
RANDOM = {"llama": 30, "qwen2": 10, "qwen3": 10, "mistral": 2}


def _cases() -> Iterator[tuple[str, int, str | int]]:
    """Per architecture all policies at TP 1, 2 and 4, and random placements at TP 2 and 4."""
    for number, (architecture, count) in enumerate(RANDOM.items()):
        for tp_size in (1, 2, 4):
            for policy in POLICIES:
                yield architecture, tp_size, policy
        for seed in range(count):
            yield architecture, 2 if seed % 2 else 4, 100 * (number + 1) + seed


@pytest.fixture(scope="module")
def report() -> SweepReport:
    """Table of the sweep."""
    return SweepReport(
        "identity-sweep",
        "Token identity with stock SGLang",
        "Budgets at the prompt length (`--fairkv-ratio 1.0`), greedy, float32, CPU, tiny random "
        f"models ({MODEL['layers']} layers, {MODEL['q_heads']} query and {MODEL['kv_heads']} KV "
        f"heads). A case is one start of the engine: a batch of {len(BATCH)} prompts of "
        f"{min(LENGTHS)} to {max(LENGTHS)} tokens, {NEW_TOKENS} new tokens each, all compared with "
        "stock SGLang at TP 1, then all once more from the prefix cache. Random placements have "
        "uneven head counts, permuted heads, and copies with uneven shares. Made by `make sweep`.",
        ("model", "TP", "placement"),
    )


@pytest.mark.sweep
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("architecture", "tp_size", "placement"), list(_cases()))
def test_sweep(
    stock: Callable[[str], Any],
    tmp_path: Path,
    report: SweepReport,
    architecture: str,
    tp_size: int,
    placement: str | int,
) -> None:
    """Every policy and many random placements, against stock SGLang of the same architecture."""
    reference = stock(architecture)
    engine = EngineProcess(
        reference.model,
        tmp_path / "log",
        fairkv=_plan(tmp_path, tp_size, placement),
        tp_size=tp_size,
        **ENGINE,
    )
    try:
        name = "random" if isinstance(placement, int) else placement
        equal = _outputs(engine, name) == reference.outputs
    finally:
        engine.close()
    report.add(
        (architecture, str(tp_size), name), f"{architecture} TP {tp_size} {placement}", equal
    )
    assert equal
