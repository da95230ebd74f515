# SPDX-License-Identifier: Apache-2.0
"""Scores written straight from the papers' formulae, float64, one token at a time where that is the
plainest; no code of the package but the random numbers of the sketch.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from safetensors.numpy import load_file
from scipy.special import erf

from fairkv_sglang.budgets import Rope
from fairkv_tests.budgets_reference import snapkv_scores

BASE = 100.0


def angles(positions: int, dim: int) -> np.ndarray:
    """[positions, dim / 2] angles of a rotary embedding."""
    return np.arange(positions)[:, None] * BASE ** (-np.arange(0, dim, 2) / dim)


def rope(positions: int, dim: int, dtype: torch.dtype = torch.float32) -> Rope:
    """The same as the package takes it."""
    angle = angles(positions, dim)
    table = torch.from_numpy(np.concatenate([np.cos(angle), np.sin(angle)], axis=1)).to(dtype)
    return Rope(lambda: table)


def turned(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """[T, D] rotated by angles [T, D / 2]: number i and i + D / 2 are one complex number."""
    half = x.shape[1] // 2
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)


def softmax(x: np.ndarray) -> np.ndarray:
    weight = np.exp(x - x.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)


def _keydiff(k, **_):
    unit = [key / np.linalg.norm(key) for key in k]
    anchor = sum(unit) / len(unit)
    return np.array([-(key @ anchor) / np.linalg.norm(anchor) for key in unit])


def _knorm(k, **_):
    return np.array([-math.sqrt(sum(x * x for x in key)) for key in k])


def _tova(q, k, scale, **_):
    return np.mean([softmax(k @ query * scale) for query in q[-1]], axis=0)


def _lagkv(k, v, *, sink=4, lag=128, **_):
    total = len(k)
    scores = [2 + t / total if t < sink else 1 + t / total for t in range(total)]
    starts = list(range(sink, total - lag + 1, lag))
    for start, after in itertools.pairwise(starts):
        parts = []
        for x in (k, v):
            least, most = x[after : after + lag].min(axis=0), x[after : after + lag].max(axis=0)
            spread = [np.std((row - least) / (most - least), ddof=1) for row in x[start:after]]
            parts.append(softmax(np.array(spread)))
        both = parts[0] + parts[1]
        for t in range(lag):
            scores[start + t] = sum(other < both[t] for other in both) / lag
    return np.array(scores)


def _leverage_of(keys, sketch):
    source = torch.Generator().manual_seed(0)
    made = torch.randn(keys.shape[1], sketch, generator=source).double().numpy()
    x = (keys - keys.mean(axis=0)) @ (made / math.sqrt(sketch))
    inverse = np.linalg.inv(x.T @ x + 0.01 * np.eye(sketch))
    return np.array([row @ inverse @ row for row in x])


def _leverage(k, *, sketch=48, **_):
    return _leverage_of(turned(k, -angles(len(k), k.shape[1])), sketch)


def _compactor(q, k, v, window, *, sink=8, sketch=48, attention_block=256, blending=0.35, **_):
    end = len(k) - window
    if end <= sink:
        return np.full(len(k), 1e30)
    keys = turned(k, -angles(len(k), k.shape[1]))[sink:end]
    got = np.zeros(len(k))
    for first in range(sink, end, attention_block):
        block = range(first, min(first + attention_block, end))
        for i in block:
            for query in q[i]:
                got[block] += softmax(k[block] @ query) / q.shape[1]
    got = np.array([got[t] * np.linalg.norm(v[t]) for t in range(sink, end)])
    padded = [0, *got, 0]
    pooled = np.array([sum(padded[t : t + 3]) / 3 for t in range(len(got))])
    both = []
    for x in (_leverage_of(keys, sketch), pooled):
        spread = x.std(ddof=1) if len(x) > 1 else 0
        both.append((x - x.mean()) / max(spread, 1e-6))
    scores = blending * both[0] + both[1]
    return np.concatenate([np.full(sink, 1e30), scores, np.zeros(window)])


def _expected_attention(q, k, v, window, scale, *, sink=4, future=512, epsilon=0.0, last, **_):
    total, group, dim = q.shape
    if total - window <= sink:
        return np.full(total, 1e30)
    later = angles(last, dim)[total : total + future]
    if not len(later):
        later = angles(last, dim)[-1:]
    mean_turn = np.mean([turned(np.eye(dim), np.tile(a, (dim, 1))).T for a in later], axis=0)
    weight = np.zeros(total - sink)
    for j in range(group):
        plain = turned(q[:, j], -angles(total, dim))[sink:]
        mean, spread = plain.mean(axis=0), np.cov(plain.T, bias=True)
        mean, spread = mean_turn @ mean, mean_turn @ spread @ mean_turn.T
        logits = [key @ mean * scale + key @ spread @ key * scale**2 / 2 for key in k[sink:]]
        weight += softmax(np.array(logits)) / group
    scores = np.array(
        [(w + epsilon) * np.linalg.norm(x) for w, x in zip(weight, v[sink:], strict=True)]
    )
    return np.concatenate([np.full(sink, 1e30), scores])


def _h2o(q, k, scale, *, accumulation="sum", **_):
    total, group, _ = q.shape
    scores = np.zeros(total)
    for i in range(total):
        for query in q[i]:
            scores[: i + 1] += softmax(k[: i + 1] @ query * scale) / group
    return scores / np.arange(total, 0, -1) if accumulation == "mean" else scores


def _kvzip(k, scale, head, passes, *, sink=4, **_):
    scores = np.zeros(len(k))
    for start, end, queries, own in passes:
        sinks = min(sink, start)
        for i, group in enumerate(queries[:, head]):
            keys = np.concatenate([k[:sinks], k[start:end], own[: i + 1, head]])
            for query in group:
                got = softmax(keys @ query * scale)[sinks : sinks + end - start]
                scores[start:end] = np.maximum(scores[start:end], got)
    scores[:sink] = 1e30
    return scores


def _kvzap(hidden, layer, head, scorer_checkpoint, **_):
    weights = load_file(scorer_checkpoint / "model.safetensors")
    name = f"layers.{layer}."
    if f"{name}weight" not in weights:
        hidden = hidden @ weights[f"{name}0.weight"].T + weights[f"{name}0.bias"]
        hidden = hidden * (1 + erf(hidden / math.sqrt(2))) / 2
        name += "2."
    return hidden @ weights[f"{name}weight"][head] + weights[f"{name}bias"][head]


def _fastkvzip(hidden, layer, head, scorer_checkpoint, *, sink=4, **_):
    weights = load_file(scorer_checkpoint / "gates.safetensors")
    weights = {key: weights[f"{layer}.{key}"] for key in _GATE}
    dim = len(weights["q_norm.weight"])

    def normed(x, weight):
        return x / np.sqrt(np.mean(x**2) + 1e-6) * weight

    offsets, scores = weights["b"][head, 0], []
    for x in hidden:
        part = slice(head * dim, (head + 1) * dim)
        key = normed(weights["k_proj.weight"][part] @ x, weights["k_norm.weight"])
        each = []
        for j, offset in enumerate(offsets):
            first = (head * len(offsets) + j) * dim
            part = slice(first, first + dim)
            query = weights["q_proj.weight"][part] @ x + weights["q_proj.bias"][part]
            query = normed(query, weights["q_norm.weight"]) / math.sqrt(dim)
            own = key @ query + offset
            each.append(1 / (1 + sum(np.exp(s @ query - own) for s in weights["k_base"][head, 0])))
        scores.append(np.mean(each))
    return np.concatenate([[1e30] * min(sink, len(hidden)), scores[sink:]])


def _random(k, layer, head, *, seed=0, **_):
    def mixed(x):
        for _ in range(2):
            x = ((x >> 16) ^ x) * 0x45D9F3B % 2**32
        return (x >> 16) ^ x

    stream = mixed(mixed(seed) ^ (layer * 65536 + head))
    return np.array([(mixed(t ^ stream) >> 8) / 2**24 for t in range(len(k))])


def _streaming(k, window, *, sink=4, **_):
    scored = len(k) - window
    return np.array([scored + min(sink, scored) - t if t < sink else t for t in range(len(k))])


_GATE = (
    "q_proj.weight", "q_proj.bias", "k_proj.weight", "q_norm.weight", "k_norm.weight", "k_base", "b"
)  # fmt: skip
_OF_HEAD = {
    "compactor": _compactor, "expected_attention": _expected_attention, "fastkvzip": _fastkvzip,
    "h2o": _h2o, "keydiff": _keydiff, "knorm": _knorm, "kvzap": _kvzap, "kvzip": _kvzip,
    "lagkv": _lagkv, "leverage": _leverage, "random": _random, "streaming": _streaming,
    "tova": _tova,
}  # fmt: skip


def _snapkv(q, k, window, scale, *, kernel_size=7, pooling="max", group="mean"):
    each = [
        snapkv_scores(part, k, window=window, kernel=kernel_size, pooling=pooling, scale=scale)
        for part in (np.split(q[-window:], q.shape[2], axis=2) if group == "max" else [q[-window:]])
    ]
    return np.max(each, axis=0)


def scores(name, q, k, v, *, window, scale, last, layer=0, passes=(), hidden=None, **options):
    """float64 [H, N - window] of all heads of a layer.

    Args:
        name: The scorer.
        q: [N, H, g, D] all queries, rotated.
        k, v: [N, H, D], keys rotated.
        last: Positions of the model.
        passes: Of each pass that repeats a chunk start and end of it, and queries and keys of all
            tokens behind the prompt, as q and k.
        hidden: [N, hidden] input of the layer's attention, for trained scorers.
    """
    hidden = None if hidden is None else np.asarray(hidden, dtype=np.float64)
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    passes = [
        (start, end, np.asarray(queries, dtype=np.float64), np.asarray(own, dtype=np.float64))
        for start, end, queries, own in passes
    ]
    scored = max(len(k) - window, 0)
    if name == "snapkv":
        return _snapkv(q, k, window, scale, **options)
    rows = [
        _OF_HEAD[name](
            q=q[:, h], k=k[:, h], v=v[:, h], window=window, scale=scale, layer=layer, head=h,
            last=last, passes=passes, hidden=hidden, **options,
        )[:scored]
        for h in range(k.shape[1])
    ]  # fmt: skip
    return np.array([np.mean(rows, axis=0)] * len(rows) if name == "tova" else rows)
