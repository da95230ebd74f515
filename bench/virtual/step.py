# SPDX-License-Identifier: Apache-2.0
"""Virtual ranks: the decode step of a tensor-parallel group, measured on one device.

Every rank's share of a layer runs alone, one rank after the other, with the kernels of the engine.
A real group would wait in each all-reduce for the slowest of them, so

    step = sum over layers of (max over ranks of attention part + all-reduce
                               + MLP part + all-reduce)
           + logits + table upkeep and planning of the rank with the most lanes

Attention part: QKV projection, append, decode attention, output projection of the rank's heads,
copies included. The MLP and the logits are the same on every rank and are timed once. The
all-reduce is modelled (``VirtualSettings``), everything else is measured. Norms, rotary embedding
and sampling are left out: they are small and the same for all placements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fairkv_sglang.bench.shares import find_profile, picked
from fairkv_sglang.bench.stats import machine
from fairkv_sglang.bench.virtual.rank import (
    WEIGHT_COPIES,
    Device,
    Owners,
    share_seconds,
    upkeep_seconds,
)
from fairkv_sglang.bench.virtual.settings import RANK_LOCAL, VirtualSettings
from fairkv_sglang.budgets import BudgetSpec, make_scope, make_scorer
from fairkv_sglang.model import Model
from fairkv_sglang.placement import CostModel, Plan, Planner, Router

FORMAT, VERSION = "fairkv-virtual", 2

Tokens = NDArray[np.int64]


def run_virtual(settings: VirtualSettings, progress: Callable[[str], None]) -> dict[str, Any]:
    """All cases; plain JSON.

    Raises:
        ValueError: in one line, for settings that do not fit the model.
    """
    dtype: torch.dtype = getattr(torch, settings.dtype)
    device = Device(settings.device, dtype, settings.decode, settings.repeats)
    with device.alone():
        cases = [_case(settings, device, *case, progress) for case in settings.cases()]
    return {
        "format": FORMAT,
        "version": VERSION,
        "machine": machine(settings.device),
        "decode": device.decode,
        "settings": settings.portable(),
        "cases": cases,
    }


def _case(
    settings: VirtualSettings,
    device: Device,
    tp: int,
    batch: int,
    budget: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    model = settings.model
    if model.intermediate_size % tp or tp > model.num_q_heads:
        raise ValueError(
            f"--tp {tp}: an MLP of {model.intermediate_size} cannot be split over {tp}"
        )
    if budget >= settings.prompt_len[0]:
        raise ValueError(
            f"--budgets {budget}: a prompt of {settings.prompt_len[0]} tokens is kept whole, "
            "nothing is left to balance; give a longer --prompt-len or a smaller budget"
        )
    kept = kept_tokens(settings, budget)
    cost = cost_model(settings, batch)
    even = _even_parts(model, device, tp, batch)
    results = {}
    for name in settings.placements:
        progress(f"TP {tp} batch {batch} budget {budget}: {name}")
        results[name] = _placement(settings, device, *place(name, kept, tp, cost), batch, even)
    base = results.get("contiguous")
    for result in results.values():
        result["speedup"] = base["step_ms"] / result["step_ms"] if base else None
    return {"tp": tp, "batch": batch, "budget": budget, "placements": results}


def cost_model(settings: VirtualSettings, batch: int) -> CostModel:
    """What the policies weigh copies with, as the engine does on this kind of device."""
    model = replace(settings.model, dtype_bytes=getattr(torch, settings.dtype).itemsize)
    return CostModel.for_model(model, settings.device, batch)


def kept_tokens(settings: VirtualSettings, budget: int) -> Tokens:
    """``[L, H]`` kept tokens of a request under scope ``head``."""
    layers, heads = settings.model.num_layers, settings.model.num_kv_heads
    profile = find_profile(settings.profile, layers, heads)
    scorer = make_scorer("snapkv", window=32)
    spec = BudgetSpec(tokens=budget)
    scope = make_scope("head", spec, layers, heads, scorer, profile)
    return np.asarray(scope.expected(settings.prompt_len[0]), dtype=np.int64)


def place(name: str, kept: Tokens, tp: int, cost: CostModel) -> tuple[Plan, Tokens]:
    """Plan of a placement and the tokens ``[L, H]`` that its heads keep.

    ``rank_local`` keeps other tokens: the same total on every rank, shared by its heads as the
    profile says.
    """
    policy = "contiguous" if name == RANK_LOCAL else name
    plan = Planner(policy=policy, tp_size=tp, cost=cost).from_expectation(kept)
    if name != RANK_LOCAL:
        return plan, kept
    loads = np.einsum("lrh,lh->lr", plan.shares(), kept)
    factor = loads.mean(axis=1, keepdims=True) / loads  # [L, R]
    scaled = np.einsum("lrh,lr,lh->lh", plan.shares(), factor, kept)
    return plan, np.maximum(np.rint(scaled), 1).astype(np.int64)


def owners_of(plan: Plan, tokens: Tokens, batch: int) -> Owners:
    """``[batch, L, H]`` ranks that serve each head of each request, by the router of the engine."""
    router = Router(plan)
    return np.stack([router.admit(key, tokens) for key in range(batch)])


def _placement(
    settings: VirtualSettings,
    device: Device,
    plan: Plan,
    tokens: Tokens,
    batch: int,
    even: dict[str, float],
) -> dict[str, Any]:
    model, ranks = settings.model, range(plan.tp_size)
    owners = owners_of(plan, tokens, batch)
    chosen = picked(min(settings.layers or model.num_layers, model.num_layers), model.num_layers)
    parts = np.zeros((2, len(chosen), len(ranks)))  # weights, KV
    for index, layer in enumerate(chosen):
        for rank in ranks:
            heads = list(plan.heads(int(layer), rank))
            lengths = np.where(owners[:, layer, heads] == rank, tokens[layer, heads], 0)
            parts[:, index, rank] = share_seconds(device, model, lengths)
    attention = parts.sum(axis=0)
    slowest, rows = attention.argmax(axis=1), np.arange(len(chosen))
    scale = model.num_layers / len(chosen)
    message = batch * model.hidden_size * device.dtype.itemsize
    weights, kv = scale * parts[:, rows, slowest].sum(axis=1)
    seconds = {
        "attention_weights_ms": float(weights),
        "attention_kv_ms": float(kv),
        "mlp_ms": even["mlp"] * model.num_layers,
        "logits_ms": even["logits"],
        "planning_ms": upkeep_seconds(device, model, plan, tokens, owners),
        "all_reduce_ms": 2 * model.num_layers * settings.all_reduce_seconds(message, len(ranks)),
    }
    step = sum(seconds.values())
    loads = np.stack([((owners == rank) * tokens).sum(axis=(0, 2)) for rank in ranks], axis=1)
    return {
        "step_ms": 1e3 * step,
        "tokens_per_s": batch / step,
        "parts": {key: 1e3 * value for key, value in seconds.items()},
        "imbalance": float(attention.max(axis=1).sum() / attention.mean(axis=1).sum()),
        "balancedness": float(loads.mean(axis=1).sum() / loads.max(axis=1).sum()),
        "copies": int(plan.copy_counts().sum()),
        "rank_tokens": [int(x) for x in loads.sum(axis=0)],
    }


def _even_parts(model: Model, device: Device, tp: int, batch: int) -> dict[str, float]:
    """Seconds of what every rank does alike: a layer's MLP, and the logits."""
    x, width = device.random(batch, model.hidden_size), model.intermediate_size // tp
    middle, vocab = device.random(batch, width), -(-model.vocab_size // tp)

    def product(x: Tensor, rows: int, least: int = WEIGHT_COPIES) -> float:
        copies = device.copies(rows * x.shape[1] * device.dtype.itemsize, least)
        matrix = device.linear(rows, x.shape[1], copies)
        return device.seconds(lambda i: matrix(x, i), copies)

    mlp = product(x, 2 * width) + product(middle, model.hidden_size)
    return {"mlp": mlp, "logits": product(x, vocab, 1)}
