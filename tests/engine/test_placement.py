# SPDX-License-Identifier: Apache-2.0
"""At a quarter of the cache the answer depends on the budgets alone, not on where heads are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairkv_sglang.placement import POLICIES, Plan
from fairkv_tests.engine_process import EngineProcess
from fairkv_tests.sweep_report import SweepReport
from fairkv_tests.tiny_models import random_prompts
from fairkv_tests.workloads import (
    BATCH,
    BUDGETED,
    CHECKS,
    ENGINE,
    FAMILIES,
    FEW,
    FEW_HEADS,
    KV_HEADS,
    LAYERS,
    LENGTHS,
    MODEL,
    far_from_home,
    random_plan,
    write_plan,
    write_profile,
)

QUARTER = 0.25
NEW_TOKENS = 48
WINDOW = 32
LONGER = [
    BATCH[LENGTHS.index(300)] + more for more in random_prompts([1, 10, 31, 32, 33], 500, seed=14)
]
"""Prompts of which all but a few tokens are cached: the cached part ends inside their window."""
THRESHOLD = 0.003
"""Attention that a few of the tokens get in the random models."""
METHODS: list[dict[str, Any]] = [
    {"scope": "uniform", "scorer": "h2o", "ratio": 0.1},
    {"scope": "layer", "scorer": "tova", "window": 48},
    {"scope": "threshold", "scorer": "expected_attention", "threshold": THRESHOLD},
    {"scope": "model"},
    {"scope": "model", "scorer": "keydiff", "window": 16},
    {"scope": "pyramid", "scorer": "leverage"},
    {"scope": "threshold", "threshold": THRESHOLD},
    {"scope": "layer", "scorer": "random", "floor_alpha": 0.0},
    {"scope": "model", "scorer": "lagkv", "lag": 20, "protect": [[3, 40]]},
]
"""Of the prompts of 64 to 700 tokens, one each, as requests name them."""
MIXED: dict[str, Any] = {"chunked_prefill_size": 48, "enable_mixed_chunk": True}
"""Chunks of a window and a half: most prompts have a border inside their last window, and most
passes hold a piece of a prompt and running requests."""


@dataclass(frozen=True)
class Run:
    """One engine's answers, kept tokens ``[L][H]`` and prompt tokens; ``own``: answers and kept
    tokens of requests with methods of their own.
    """

    outputs: list[list[int]]
    kept: list[list[int]]
    prompt_tokens: int
    own: tuple[list[list[int]], list[list[int]]]


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        scope: Budget scope; ``head`` takes budgets from a profile, as does every policy.
        tp_size: Ranks.
        placement: A policy, or the seed of a random placement.
        heads: KV heads of the model.
        away: No head of the random placement stays at home.
        mixed: With :data:`MIXED`.
        family: A key of ``FAMILIES`` instead of Llama.
    """

    scope: str
    tp_size: int
    placement: str | int
    heads: int = KV_HEADS
    away: bool = False
    mixed: bool = False
    family: str | None = None

    @property
    def kind(self) -> str:
        """The placement's column in the report."""
        if isinstance(self.placement, str):
            return self.placement
        words = ("random", "none at home" if self.away else "", "mixed" if self.mixed else "")
        return ", ".join(filter(None, words))

    def __str__(self) -> str:
        words = [self.scope, f"tp{self.tp_size}", f"{self.heads}heads", str(self.placement)]
        if not isinstance(self.placement, str):
            words.append(self.kind.replace(", ", "-").replace(" ", "-"))
        if self.family:
            words.append(self.family.replace(", ", "-"))
        return "-".join(words)


def _run(model: Path, folder: Path, case: Case) -> Run:
    options: dict[str, Any] = {
        "ratio": QUARTER,
        **_scope(case.scope),
        "window": WINDOW,
        "profile": write_profile(folder, case.heads),
        "placement": case.placement,
        "replan": "off",
    }
    if isinstance(case.placement, int):
        del options["placement"]
        options["plan"] = write_plan(folder, case.tp_size, case.placement, case.heads, case.away)
    engine = EngineProcess(
        model,
        folder / "log",
        fairkv=options,
        environment=CHECKS,
        tp_size=case.tp_size,
        **{**ENGINE, **(MIXED if case.mixed else {})},
    )
    try:
        return _answers(engine)
    finally:
        engine.close()


def _scope(name: str) -> dict[str, Any]:
    return {"scope": name} | ({"threshold": THRESHOLD} if name == "threshold" else {})


def _answers(engine: EngineProcess) -> Run:
    before = engine.fairkv()
    outputs = engine.generate(BATCH, NEW_TOKENS)
    # Chunks, batches and cached prefixes differ now, kept sets must not.
    assert engine.generate(BATCH[::-1], NEW_TOKENS)[::-1] == outputs
    longer = engine.generate(LONGER, NEW_TOKENS)
    engine.call("empty_cache")
    assert engine.generate(LONGER, NEW_TOKENS) == longer
    after = engine.fairkv()
    kept = np.array(after["kept"]["tokens"]) - np.array(before["kept"]["tokens"])
    tokens = after["prompt_tokens"] - before["prompt_tokens"]
    return Run(outputs + longer, kept.tolist(), tokens, _own_methods(engine, after))


def _own_methods(
    engine: EngineProcess, before: dict[str, Any]
) -> tuple[list[list[int]], list[list[int]]]:
    """In one batch, some prompts cached; none of them is planned for."""
    sampling = [
        {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True, "custom_params": {"fairkv": m}}
        for m in METHODS
    ]
    prompts = BATCH[5 : 5 + len(METHODS)]
    results = engine.call("generate", input_ids=prompts, sampling_params=sampling)
    after = engine.fairkv()
    assert after["traffic"]["count"] == before["traffic"]["count"]
    kept = np.array(after["kept"]["tokens"]) - np.array(before["kept"]["tokens"])
    assert kept.sum() < 0.5 * sum(map(len, prompts)) * kept.size
    return [result["output_ids"] for result in results], kept.tolist()


def _model(tiny_model: Callable[..., Path], heads: int, family: str | None = None) -> Path:
    shape = FAMILIES[family] if family else {}
    return tiny_model(**(MODEL if heads == KV_HEADS else FEW), **shape)


@pytest.fixture(scope="session")
def reference(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Case], Run]:
    """``reference(case)``: the same budgets at TP 1, run once.

    Scope ``rank`` has other budgets for another number of ranks: there it is SGLang's own split.
    """
    done: dict[Case, Run] = {}

    def run(case: Case) -> Run:
        tp_size = case.tp_size if case.scope == "rank" else 1
        plain = Case(case.scope, tp_size, "contiguous", case.heads, family=case.family)
        if plain not in done:
            folder = tmp_path_factory.mktemp("reference")
            done[plain] = _run(_model(tiny_model, case.heads, case.family), folder, plain)
        return done[plain]

    return run


def _same(run: Run, reference: Run) -> bool:
    """Equal tokens, and equal kept counts of every head over all prompts."""
    own = run.own == reference.own
    return own and run.outputs == reference.outputs and run.kept == reference.kept


def _check_compressed(
    run: Run, heads: int, family: str | None = None, least: float = QUARTER
) -> None:
    """About a quarter is kept: more only of prompts that are not much longer than the window."""
    lengths = LENGTHS + list(map(len, LONGER))
    assert run.prompt_tokens == 2 * sum(lengths)
    layers = BUDGETED.get(family or "", list(range(LAYERS)))
    kept = np.array(run.kept)[layers].sum()
    full = run.prompt_tokens * len(layers) * heads
    allowed = 2 * sum(min(n, n * QUARTER + WINDOW + 1) for n in lengths) * len(layers) * heads
    assert least * full * 0.99 <= kept <= allowed < 0.4 * full


@pytest.mark.parametrize(
    "case",
    [
        Case("layer", 2, 11, mixed=True),
        pytest.param(Case("head", 4, 12), marks=pytest.mark.sweep),
        pytest.param(Case("layer", 4, 32, heads=FEW_HEADS), marks=pytest.mark.sweep),
        *(
            pytest.param(Case("layer", 2, 11, mixed=True, family=family), marks=pytest.mark.sweep)
            for family in FAMILIES
        ),
    ],
    ids=str,
)
def test_answer_is_that_of_one_rank(
    tiny_model: Callable[..., Path],
    reference: Callable[[Case], Run],
    tmp_path: Path,
    case: Case,
) -> None:
    """Random placements with copies and with heads that left their homes, against TP 1; with the
    server's scorer and scope, and with those of requests.
    """
    assert isinstance(case.placement, int)
    if case.heads == KV_HEADS:
        assert far_from_home(random_plan(case.tp_size, case.placement))
    run = _run(_model(tiny_model, case.heads, case.family), tmp_path, case)
    assert _same(run, reference(case))
    _check_compressed(run, case.heads, case.family)


@pytest.fixture(scope="module")
def report() -> SweepReport:
    """Table of the sweep."""
    return SweepReport(
        "placement-sweep",
        "Placement never changes an answer",
        f"A quarter of the cache, greedy, float32, CPU, tiny random Llama with {KV_HEADS} or "
        f"{FEW_HEADS} KV heads, {len(BATCH)} prompts of {min(LENGTHS)} to {max(LENGTHS)} tokens, "
        f"{NEW_TOKENS} new tokens each: tokens, and kept counts of every head, compared with TP 1 "
        "(scope `rank`: with SGLang's own split). `mixed`: chunks of 48 tokens in mixed batches. "
        "Made by `make sweep`.",
        ("scope", "KV heads", "TP", "placement"),
    )


_CASES = [
    *(
        Case(scope, tp_size, placement)
        for scope in ("layer", "head")
        for tp_size in (2, 4)
        for placement in (*POLICIES, 11, 12, 13)
    ),
    *(
        Case("uniform", tp_size, placement)
        for tp_size in (2, 4)
        for placement in ("fair_copying", 11, 12)
    ),
    *(Case(scope, tp_size, 14, away=True) for scope in ("layer", "head") for tp_size in (2, 4)),
    *(Case("layer", tp_size, 15, mixed=True) for tp_size in (2, 4)),
    *(
        Case(scope, tp_size, placement, mixed=True)
        for scope in ("model", "threshold")
        for tp_size in (2, 4)
        for placement in ("fair_copying", 12)
    ),
    Case("model", 4, 32, heads=FEW_HEADS),
    *(Case("rank", tp_size, placement) for tp_size in (2, 4) for placement in (16, 17)),
    *(
        Case(scope, 4, placement, heads=FEW_HEADS)
        for scope in ("layer", "head")
        for placement in ("contiguous", "fair_copying", 31, 32)
    ),
    Case("layer", 4, 33, heads=FEW_HEADS, away=True, mixed=True),
]


_GROUPS = list(dict.fromkeys((c.scope, c.tp_size, c.heads, c.mixed) for c in _CASES))


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("scope", "tp_size", "heads", "mixed"), _GROUPS)
def test_sweep(
    tiny_model: Callable[..., Path],
    reference: Callable[[Case], Run],
    tmp_path: Path,
    report: SweepReport,
    scope: str,
    tp_size: int,
    heads: int,
    mixed: bool,
) -> None:
    """Every policy and random placements, all scopes; one engine goes from one to the next."""
    proposal = tmp_path / "proposal.json"
    engine = EngineProcess(
        _model(tiny_model, heads),
        tmp_path / "log",
        fairkv={
            "ratio": QUARTER,
            **_scope(scope),
            "window": WINDOW,
            "profile": write_profile(tmp_path, heads),
            "spare_lanes": heads,
        },
        environment={**CHECKS, "FAIRKV_TEST_PLANS": str(proposal)},
        tp_size=tp_size,
        **{**ENGINE, **(MIXED if mixed else {})},
    )
    different = []
    try:
        for case in _CASES:
            if (case.scope, case.tp_size, case.heads, case.mixed) != (scope, tp_size, heads, mixed):
                continue
            path = write_plan(tmp_path, tp_size, case.placement, heads, case.away)
            plan = Plan.from_file(path)
            proposal.write_text(plan.to_json())
            engine.call("adopt_plan", digest=plan.digest)
            run = _answers(engine)
            equal = _same(run, reference(case))
            report.add((scope, str(heads), str(tp_size), case.kind), str(case), equal)
            if not equal:
                different.append(str(case))
            # what is above the threshold may be less
            _check_compressed(run, heads, None, QUARTER / 2 if scope == "threshold" else QUARTER)
    finally:
        engine.close()
    assert not different
