# SPDX-License-Identifier: Apache-2.0
"""Virtual ranks: the decode step of a tensor-parallel group, measured on one device.

Every rank's share of a layer runs alone, one rank after the other, with the kernels of the engine.
A real group would wait in each all-reduce for the slowest of them, so

    step = sum over layers of (max over ranks of attention part + all-reduce
                               + MLP part + all-reduce)
           + logits + table upkeep and planning of the rank with the most lanes

Attention part: QKV projection, append, decode attention, output projection of the rank's heads,
copies included. The MLP and the logits are the same on every rank and are timed once. The
all-reduce is modelled (:class:`fairkv_sglang.bench.sizes.Link`), everything else is measured.
Norms, rotary embedding and sampling are left out: they are small and the same for all placements.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fairkv_sglang.bench.shares import find_profile, picked
from fairkv_sglang.bench.sizes import Link, ModelSizes
from fairkv_sglang.bench.virtual_rank import Device, LayerShare, upkeep_seconds
from fairkv_sglang.bench.workload import portable
from fairkv_sglang.budgets import BudgetSpec, make_scope, make_scorer
from fairkv_sglang.placement import CostModel, Plan, Router, make_plan

FORMAT, VERSION = "fairkv-virtual", 1
RANK_LOCAL = "rank_local"
PLACEMENTS = ("contiguous", "best_effort", "equal_shares", "fair_copying", RANK_LOCAL)

Tokens = NDArray[np.int64]
Progress = Callable[[str], None]


class VirtualSettings(BaseModel):
    """A run with virtual ranks.

    Attributes:
        sizes: The model.
        profile: Head profile, mapped onto the model; None makes a synthetic one.
        tp_sizes, batches, budgets: Every combination is a case; budgets in tokens per head.
        prompt_len: Prompt tokens: the most that a head can keep.
        placements: Names of policies, and ``rank_local``: contiguous with equal totals.
        layers: Layers that are measured, evenly spaced, and stand for all; None: all.
        repeats: Measurements of each part, of which the median counts.
        decode: ``auto`` is what the engine takes on the device: FlashInfer, or numba on CPU.
        cost: What the policies weigh copies with: ``device`` as the engine does (bytes, and the
            device's constants), ``bytes`` alone, or both kinds of bytes ``measured`` first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sizes: ModelSizes
    profile: Path | None = None
    tp_sizes: tuple[int, ...] = (4,)
    batches: tuple[int, ...] = (64,)
    budgets: tuple[int, ...] = (1024,)
    prompt_len: int = Field(default=8192, ge=1)
    window: int = Field(default=32, ge=1)
    floor_alpha: float = Field(default=0.2, ge=0, le=1)
    placements: tuple[str, ...] = PLACEMENTS
    layers: int | None = Field(default=None, ge=1)
    repeats: int = Field(default=5, ge=1)
    link: Link = Link()
    device: str = "cpu"
    dtype: str = "bfloat16"
    decode: str = "auto"
    cost: Literal["device", "bytes", "measured"] = "device"

    def cases(self) -> list[tuple[int, int, int]]:
        """``(tp, batch, budget)`` of every case."""
        return [(t, b, k) for t in self.tp_sizes for b in self.batches for k in self.budgets]


def run_virtual(settings: VirtualSettings, progress: Progress) -> dict[str, Any]:
    """All cases; plain JSON.

    Raises:
        ValueError: in one line, for settings that do not fit the model.
    """
    device = Device.create(settings.device, settings.dtype, settings.decode)
    with device.alone():
        cases = [_case(settings, device, *case, progress) for case in settings.cases()]
    return {
        "format": FORMAT,
        "version": VERSION,
        "device": device.describe(),
        "settings": portable(settings.model_dump(mode="json")),
        "cases": cases,
    }


def _case(
    settings: VirtualSettings,
    device: Device,
    tp: int,
    batch: int,
    budget: int,
    progress: Progress,
) -> dict[str, Any]:
    sizes = settings.sizes
    if sizes.intermediate % tp or tp > sizes.q_heads:
        raise ValueError(f"--tp {tp}: an MLP of {sizes.intermediate} cannot be split over {tp}")
    if budget >= settings.prompt_len:
        raise ValueError(
            f"--budgets {budget}: a prompt of {settings.prompt_len} tokens is kept whole, nothing "
            "is left to balance; give a longer --prompt-len or a smaller budget"
        )
    kept = kept_tokens(settings, budget)
    chosen = picked(min(settings.layers or sizes.layers, sizes.layers), sizes.layers)
    even = _even_parts(settings, device, tp, batch)
    results = {}
    kind = settings.device if settings.cost == "device" else None
    cost = sizes.cost_model(device.dtype_bytes, batch, kind)
    if settings.cost == "measured":
        cost = measured_cost(device, sizes, cost, budget, settings.repeats)
    for name in settings.placements:
        plan, tokens = place(name, kept, tp, cost)
        progress(f"TP {tp} batch {batch} budget {budget}: {name}")
        results[name] = _placement(settings, device, plan, tokens, batch, chosen, even)
    base = results.get("contiguous")
    for result in results.values():
        result["speedup"] = base["step_ms"] / result["step_ms"] if base else None
    return {
        "tp": tp,
        "batch": batch,
        "budget": budget,
        "cost_model": cost.model_dump(),
        "placements": results,
    }


def measured_cost(
    device: Device, sizes: ModelSizes, cost: CostModel, budget: int, repeats: int
) -> CostModel:
    """``cost`` in seconds, from one share of one head and one of four."""
    batch = int(cost.batch)
    weights, attention = {}, {}
    for heads in (1, 4):
        share = LayerShare(device, sizes, np.full((batch, heads), budget))
        weights[heads], attention[heads] = share.seconds(repeats)
    per_lane = max((weights[4] - weights[1]) / 3, 1e-9)
    return cost.model_copy(
        update={
            "weight_byte_cost": per_lane / cost.slice_bytes,
            "kv_byte_cost": attention[4] / (4 * batch * budget * cost.token_bytes),
        }
    )


def kept_tokens(settings: VirtualSettings, budget: int) -> Tokens:
    """``[L, H]`` kept tokens of a request under scope ``head``."""
    sizes = settings.sizes
    profile = find_profile(settings.profile, sizes.layers, sizes.kv_heads)
    scorer = make_scorer("snapkv", window=settings.window)
    spec = BudgetSpec(tokens=budget)
    scope = make_scope(
        "head",
        spec,
        sizes.layers,
        sizes.kv_heads,
        scorer,
        profile,
        floor_alpha=settings.floor_alpha,
    )
    return np.asarray(scope.expected(settings.prompt_len), dtype=np.int64)


def place(name: str, kept: Tokens, tp: int, cost: CostModel) -> tuple[Plan, Tokens]:
    """Plan of a placement and the tokens ``[L, H]`` that its heads keep.

    ``rank_local`` keeps other tokens: the same total on every rank, shared by its heads as the
    profile says.
    """
    policy = "contiguous" if name == RANK_LOCAL else name
    plan = make_plan(policy, kept, tp, cost=cost)
    if name != RANK_LOCAL:
        return plan, kept
    loads = np.einsum("lrh,lh->lr", plan.shares(), kept)
    factor = loads.mean(axis=1, keepdims=True) / loads  # [L, R]
    scaled = np.einsum("lrh,lr,lh->lh", plan.shares(), factor, kept)
    return plan, np.maximum(np.rint(scaled), 1).astype(np.int64)


def owners_of(plan: Plan, tokens: Tokens, batch: int) -> NDArray[np.int16]:
    """``[batch, L, H]`` ranks that serve each head of each request, by the router of the engine."""
    router = Router(plan)
    return np.stack([router.admit(key, tokens) for key in range(batch)])


def _placement(
    settings: VirtualSettings,
    device: Device,
    plan: Plan,
    tokens: Tokens,
    batch: int,
    chosen: NDArray[np.int64],
    even: dict[str, float],
) -> dict[str, Any]:
    sizes, tp = settings.sizes, plan.tp_size
    owners = owners_of(plan, tokens, batch)
    weights, attention = np.zeros((len(chosen), tp)), np.zeros((len(chosen), tp))
    for index, layer in enumerate(chosen):
        for rank in range(tp):
            heads = list(plan.heads(int(layer), rank))
            lengths = np.where(owners[:, layer, heads] == rank, tokens[layer, heads], 0)
            share = LayerShare(device, sizes, lengths)
            weights[index, rank], attention[index, rank] = share.seconds(settings.repeats)
    part = weights + attention
    slowest = part.argmax(axis=1)
    rows = np.arange(len(chosen))
    scale = sizes.layers / len(chosen)
    most_lanes = max(range(tp), key=lambda rank: int(plan.lane_start(rank)[-1]))
    upkeep = upkeep_seconds(device, plan, most_lanes, tokens, owners, settings.repeats)
    message = batch * sizes.hidden * device.dtype_bytes
    parts = {
        "attention_weights_ms": scale * float(weights[rows, slowest].sum()),
        "attention_kv_ms": scale * float(attention[rows, slowest].sum()),
        "mlp_ms": even["mlp"] * sizes.layers,
        "logits_ms": even["logits"],
        "planning_ms": upkeep,
        "all_reduce_ms": 2 * sizes.layers * settings.link.seconds(message, tp),
    }
    step = sum(parts.values())
    loads = np.stack([((owners == rank) * tokens).sum(axis=(0, 2)) for rank in range(tp)], axis=1)
    mean = float(part.mean(axis=1).sum()) * scale
    fullest = float(part.max(axis=1).sum()) * scale
    planned = np.einsum("lrh,lh->lr", plan.shares(), tokens)
    return {
        "step_ms": 1e3 * step,
        "tokens_per_s": batch / step,
        "parts": {key: 1e3 * value for key, value in parts.items()},
        "attention_mean_rank_ms": 1e3 * mean,
        "imbalance": fullest / mean,
        "balancedness": float(loads.mean(axis=1).sum() / loads.max(axis=1).sum()),
        "planned_balancedness": float(planned.mean(axis=1).sum() / planned.max(axis=1).sum()),
        "copies": int(plan.copy_counts().sum()),
        "rank_tokens": [int(x) for x in loads.sum(axis=0)],
    }


def _even_parts(settings: VirtualSettings, device: Device, tp: int, batch: int) -> dict[str, float]:
    """Seconds of what every rank does alike: a layer's MLP, and the logits."""
    sizes = settings.sizes
    x = device.random(batch, sizes.hidden)
    up = device.weights(2 * sizes.intermediate // tp, sizes.hidden)
    down = device.weights(sizes.hidden, sizes.intermediate // tp)
    middle = device.random(batch, sizes.intermediate // tp)
    vocab = device.weights(-(-sizes.vocab // tp), sizes.hidden, copies=1)
    linear = torch.nn.functional.linear
    return {
        "mlp": device.seconds(lambda i: linear(x, up[i % len(up)]), settings.repeats)
        + device.seconds(lambda i: linear(middle, down[i % len(down)]), settings.repeats),
        "logits": device.seconds(lambda i: linear(x, vocab[0]), settings.repeats),
    }
