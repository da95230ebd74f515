# SPDX-License-Identifier: Apache-2.0
"""With budgets at or above the prompt length FairKV gives stock SGLang's tokens, for any placement.

Greedy, float32, a batch of 16 prompts of 1 to 2,000 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fairkv_sglang.placement import POLICIES, Plan
from fairkv_tests.engine_process import EngineProcess
from fairkv_tests.sweep_report import SweepReport
from fairkv_tests.tiny_models import hugging_face_outputs
from fairkv_tests.workloads import (
    BATCH,
    CHECKS,
    ENGINE,
    FAMILIES,
    FEW,
    FEW_HEADS,
    LENGTHS,
    MODEL,
    NEW_TOKENS,
    far_from_home,
    random_plan,
    write_plan,
)

FULL = {"ratio": 1.0, "replan": "off"}
SHORTER = [i for i, length in enumerate(LENGTHS) if length in (1, 33, 64, 300, 511, 513, 1200)]
"""Prompts of most cases of the sweep."""


def _outputs(engine: EngineProcess, plan: str, prompts: list[list[int]]) -> list[list[int]]:
    """Tokens of the batch, twice (the second time from the prefix cache), and what must be on."""
    before = engine.fairkv()["ranks"][0]["handed_over_tokens"]
    outputs = engine.generate(prompts, NEW_TOKENS)
    assert engine.generate(prompts, NEW_TOKENS) == outputs
    state = engine.fairkv()
    assert state["placement"].startswith(plan)
    assert [rank["handed_over_tokens"] for rank in state["ranks"]] == (
        [before + 2 * sum(map(len, prompts))] * len(state["ranks"])
    )
    return outputs


def _run(
    model: Path,
    folder: Path,
    tp_size: int,
    plan: str,
    name: str,
    prompts: list[list[int]] = BATCH,
) -> list[list[int]]:
    """Outputs of a fresh engine with the plan of a file."""
    engine = EngineProcess(
        model,
        folder / "log",
        fairkv={**FULL, "plan": plan},
        environment=CHECKS,
        tp_size=tp_size,
        **ENGINE,
    )
    try:
        return _outputs(engine, name, prompts)
    finally:
        engine.close()


SEEDS = {2: 1, 4: 2}


@pytest.mark.parametrize(
    "tp_size",
    [
        1,
        # such placements are in test_prefill and test_memory at TP 2, below at TP 4
        pytest.param(2, marks=[pytest.mark.sweep, pytest.mark.smoke]),
        pytest.param(4, marks=pytest.mark.sweep),
    ],
)
def test_llama_equals_stock(stock: Callable[[str], Any], tmp_path: Path, tp_size: int) -> None:
    """TP 2 and 4 with uneven, permuted and copied heads, some of which leave their home."""
    reference = stock("llama")
    if tp_size > 1:
        assert far_from_home(random_plan(tp_size, SEEDS[tp_size]))
    name = SEEDS.get(tp_size, "fair_copying")
    plan = write_plan(tmp_path, tp_size, name)
    outputs = _run(reference.model, tmp_path, tp_size, plan, "random" if tp_size > 1 else str(name))
    assert outputs == reference.outputs


def test_fewer_heads_than_ranks_equal_the_model_itself(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """TP 4, 2 KV heads in 4 copies at home; a random placement with copies of its own."""
    model = tiny_model(**FEW)
    plan = write_plan(tmp_path, 4, 31, heads=FEW_HEADS)
    outputs = _run(model, tmp_path, 4, plan, "random")
    assert outputs == hugging_face_outputs(model, BATCH, NEW_TOKENS)


@pytest.mark.parametrize(
    "family",
    # Qwen3 is in test_prefill, Qwen2 in test_weights
    [
        name if name in ("qwen3_moe", "gemma3") else pytest.param(name, marks=pytest.mark.sweep)
        for name in FAMILIES
    ],
)
def test_other_families_equal_the_model_itself(
    tiny_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    """At TP 2 with a random placement, against transformers."""
    model = tiny_model(**MODEL, **FAMILIES[family])
    outputs = _run(model, tmp_path, 2, write_plan(tmp_path, 2, 3), "random")
    assert outputs == hugging_face_outputs(model, BATCH, NEW_TOKENS)


RANDOM = {"llama": 30, "qwen2": 10, "qwen3": 10, "mistral": 2, "llama, 2 KV heads": 6}
AWAY = 3


@dataclass(frozen=True)
class Case:
    """One placement of the sweep.

    Attributes:
        model: Architecture, and what differs from the model of the other tests.
        tp_size: Ranks.
        placement: A policy, or the seed of a random placement.
        away: No head stays at home.
        long: The whole batch, prompts of 2,000 tokens included.
    """

    model: str
    tp_size: int
    placement: str | int
    away: bool = False
    long: bool = False

    @property
    def kind(self) -> str:
        """The placement's column in the report."""
        if isinstance(self.placement, str):
            return self.placement
        return "random, none at home" if self.away else "random"

    def __str__(self) -> str:
        return f"{self.model}-tp{self.tp_size}-{self.placement}".replace(", ", "-").replace(
            " ", "-"
        )


def _cases() -> Iterator[Case]:
    """Per architecture all policies at TP 1, 2 and 4, and random placements at TP 2 and 4.

    With one rank there is one placement, so one policy stands for all there.
    """
    for number, (name, count) in enumerate(RANDOM.items()):
        few = name not in ("llama", "qwen2", "qwen3", "mistral")
        if not few:
            yield Case(name, 1, "fair_copying", long=True)
        for tp_size in (4,) if few else (2, 4):
            for policy in POLICIES:
                yield Case(name, tp_size, policy, long=name == "llama" or few)
        for seed in range(count):
            tp_size = 4 if few or seed % 2 == 0 else 2
            yield Case(name, tp_size, 100 * (number + 1) + seed, long=seed % 5 == 0)
        for seed in range(AWAY if name in ("llama", "llama, 2 KV heads") else 0):
            tp_size = 4 if few or seed % 2 == 0 else 2
            yield Case(name, tp_size, 100 * (number + 1) + 90 + seed, away=True)


@pytest.fixture(scope="module")
def report() -> SweepReport:
    """Table of the sweep."""
    return SweepReport(
        "identity-sweep",
        "Token identity with stock SGLang",
        "Budgets at the prompt length (`--fairkv-ratio 1.0`), greedy, float32, CPU, tiny random "
        f"models ({MODEL['layers']} layers, {MODEL['q_heads']} query and {MODEL['kv_heads']} KV "
        f"heads, or {FEW['q_heads']} and {FEW_HEADS}). A case is one placement, which a running "
        "engine adopts with as many lane slots as there are heads: a batch "
        f"of {len(BATCH)} prompts of {min(LENGTHS)} to {max(LENGTHS)} tokens, or {len(SHORTER)} of "
        f"them up to {max(LENGTHS[i] for i in SHORTER)}, {NEW_TOKENS} new tokens each, all "
        "compared with stock SGLang at TP 1, then all once more from the prefix cache. Policies "
        "place lognormal loads. Random placements have uneven head counts, permuted heads, and "
        "copies with uneven shares; heads may leave their home, or all do. Made by `make sweep`.",
        ("model", "TP", "placement"),
    )


_GROUPS = list(dict.fromkeys((case.model, case.tp_size) for case in _cases()))


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("model", "tp_size"), _GROUPS)
def test_sweep(
    stock: Callable[..., Any], tmp_path: Path, report: SweepReport, model: str, tp_size: int
) -> None:
    """Every policy and many random placements, against stock SGLang of the same architecture.

    One engine goes from placement to placement as a server does that plans anew.
    """
    few = "2 KV heads" in model
    reference = stock(model.split(",")[0], **(FEW if few else MODEL))
    heads = FEW_HEADS if few else MODEL["kv_heads"]
    proposal = tmp_path / "proposal.json"
    engine = EngineProcess(
        reference.model,
        tmp_path / "log",
        fairkv={"ratio": 1.0, "spare_lanes": heads},
        environment={**CHECKS, "FAIRKV_TEST_PLANS": str(proposal)},
        tp_size=tp_size,
        **ENGINE,
    )
    different = []
    try:
        for case in [c for c in _cases() if (c.model, c.tp_size) == (model, tp_size)]:
            which = list(range(len(BATCH))) if case.long else SHORTER
            name = case.placement if isinstance(case.placement, str) else "random"
            if tp_size > 1:
                path = write_plan(tmp_path, tp_size, case.placement, heads, case.away)
                plan = Plan.from_file(path)
                proposal.write_text(plan.to_json())
                engine.call("adopt_plan", digest=plan.digest)
            outputs = _outputs(engine, name, [BATCH[i] for i in which])
            equal = outputs == [reference.outputs[i] for i in which]
            report.add((model, str(tp_size), case.kind), str(case), equal)
            if not equal:
                different.append(str(case))
    finally:
        engine.close()
    assert not different
