# SPDX-License-Identifier: Apache-2.0
"""A Llama with random weights whose heads keep what a table says, and other heads on other prompts.

Ada-KV over a layer gives most tokens to the head whose attention is most dispersed. Here the
dispersion of each head is one number. The hidden state has three parts:

    task   a constant, in one dimension on prompts of task A, in the other on those of task B
    noise  random, of the token
    out    what attention and MLP write; only the language-model head reads it

Queries read the task alone and keys the noise alone, along one dimension that RoPE hardly turns. So
every query of a prompt of task A gives token t the logit ``scale[A, head] * n(head, t)`` with n
about normal: attention is even at scale 0 and sits on a few tokens at scale 10. :func:`calibrate`
finds the scales with the scorer of the product.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fairkv_sglang.bench import checkpoint
from fairkv_sglang.bench.shares import find_profile
from fairkv_sglang.budgets import make_scorer
from fairkv_sglang.model import Model

FloatArray = NDArray[np.float64]

TASKS = ("A", "B")
PROMPT, WINDOW, RATIO = 1024, 32, 0.125
"""Tokens of a prompt and the budget for which heads are calibrated."""
LEVEL = 0.4
"""Threshold of a layer's pooled top-k, in times the mean score. Below 1, so that a head without any
preference keeps everything, and keeps less the larger its scale."""
STEEPEST = 60.0
LEAST = 0.1
"""Least share of a head: its best token brings its neighbours (pooling of 7)."""
SHAPE = Model("skewed", 4, 16, 8, 128, 128, 128, 2048, context=2048)
OUT = 32  # dimensions that are written
SPECIAL = 3  # ids below are never in a prompt

Weights = dict[str, torch.Tensor]


def targets(
    profile: Path | None, layers: int = SHAPE.num_layers, heads: int = SHAPE.num_kv_heads
) -> FloatArray:
    """``[task, L, H]`` shares of what the heads of a layer compete for, mean 1 over each layer.

    Four layers of the profile (log-normal shares without one). Task B has the heads in reverse, so
    that other heads are hot and other ranks are full.
    """
    shares = find_profile(profile, layers, heads).shares
    relative = np.maximum(shares / shares.mean(axis=1, keepdims=True), LEAST)
    relative /= relative.mean(axis=1, keepdims=True)
    return np.stack([relative, relative[:, ::-1]])


def prompts(task: str, count: int, seed: int, length: int = PROMPT) -> list[list[int]]:
    """Random prompts of a task: each has half of the vocabulary."""
    middle = SHAPE.vocab_size // 2
    low, high = (SPECIAL, middle) if task == "A" else (middle, SHAPE.vocab_size)
    rng = np.random.default_rng([seed, TASKS.index(task)])
    return rng.integers(low, high, (count, length)).tolist()  # type: ignore[no-any-return]


def build_skewed(target: FloatArray, folder: Path, seed: int = 0) -> Path:
    """Write the checkpoint (float32 safetensors, no tokenizer) to ``folder``."""
    weights = random_weights(seed)
    for task, scales in enumerate(calibrate(weights, target)):
        _set_scales(weights, task, scales)
    config = checkpoint.config(SHAPE)
    # The dimension that is read is the slowest of the rotary embedding: it stands still.
    config["rope_parameters"] = {"rope_theta": 1e9, "rope_type": "default"}
    return checkpoint.write(folder, config, weights)


def calibrate(weights: Weights, target: FloatArray, samples: int = 8) -> FloatArray:
    """Scales ``[task, L, H]`` with which heads keep their share, by bisection.

    At a given threshold the part of its tokens that a head has above it falls with its scale, so
    that each head can be set alone; parts that add up to the budget make it the layer's threshold.
    """
    beyond, scored = RATIO * PROMPT - WINDOW, PROMPT - WINDOW
    part = target * beyond / scored
    if part.max() > 1:
        raise ValueError(f"a head cannot keep {part.max():.2f} times its prompt")
    low, high = np.zeros(target.shape), np.full(target.shape, STEEPEST)
    tasks = [read_noise(weights, task, samples) for task in range(len(TASKS))]
    for _ in range(16):
        middle = (low + high) / 2
        above = [
            [(scores(noise, scales) > LEVEL / PROMPT).mean(axis=2) for noise in prompts]
            for prompts, scales in zip(tasks, middle, strict=True)
        ]
        found = np.mean(above, axis=1)
        low, high = np.where(found > part, middle, low), np.where(found > part, high, middle)
    return (low + high) / 2


def read_noise(weights: Weights, task: int, samples: int) -> list[FloatArray]:
    """What the heads' keys read of the tokens of some prompts, each ``[L, H, N]``."""
    table = weights["model.embed_tokens.weight"]
    keys = torch.stack(
        [weights[_name(i, "k_proj")][_slow(SHAPE.num_kv_heads)] for i in range(SHAPE.num_layers)]
    )
    ids = torch.tensor(prompts(TASKS[task], samples, seed=1 << 20))
    return [np.asarray((keys @ table[row].T).numpy(), dtype=np.float64) for row in ids]


def scores(noise: FloatArray, scales: FloatArray) -> NDArray[np.float32]:
    """SnapKV's scores ``[L, H, N - window]`` of one prompt, all layers in one call."""
    layers, heads, length = noise.shape
    keys = torch.from_numpy(noise.reshape(layers * heads, length).T).float()[:, :, None]
    queries = torch.from_numpy(scales.reshape(1, -1)).float().expand(WINDOW, -1)[:, :, None, None]
    wide = torch.nn.functional.pad
    scorer = make_scorer("snapkv", window=WINDOW)
    # One dimension counts; kernels have a least width.
    found = scorer.score(wide(queries, (0, 15)), wide(keys, (0, 15)), scale=1.0)
    return np.asarray(found.reshape(layers, heads, -1).numpy())


def random_weights(seed: int = 0) -> Weights:
    """Everything but the rows of the queries that depend on the scales."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, part: slice, size: float = 1.0) -> torch.Tensor:
        """Random rows that read ``part`` of the columns, results of the given size."""
        out = torch.zeros((rows, columns))
        width = len(range(*part.indices(columns)))
        out[:, part] = torch.randn((rows, width), generator=generator) * size * width**-0.5
        return out

    hidden, inner = SHAPE.hidden_size, SHAPE.intermediate_size
    noise, out, everything = slice(2, hidden - OUT), slice(hidden - OUT, hidden), slice(None)
    q, kv = SHAPE.num_q_heads * SHAPE.head_dim, SHAPE.num_kv_heads * SHAPE.head_dim
    table = torch.zeros((SHAPE.vocab_size, hidden))
    width = hidden - OUT - 2
    random = torch.randn((SHAPE.vocab_size, width), generator=generator)
    table[:, noise] = random / random.norm(dim=1, keepdim=True) * width**0.5
    # All rows have the norm that RMSNorm gives them, so that it changes nothing.
    table[: SHAPE.vocab_size // 2, 0] = table[SHAPE.vocab_size // 2 :, 1] = (hidden - width) ** 0.5
    weights = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": torch.ones(hidden),
        # Next tokens depend as much on what attention read as on the last token.
        "lm_head.weight": matrix(SHAPE.vocab_size, hidden, noise)
        + matrix(SHAPE.vocab_size, hidden, out, 100.0),
    }
    for i in range(SHAPE.num_layers):
        keys = matrix(kv, hidden, noise)
        slow = _slow(SHAPE.num_kv_heads)
        keys[slow] *= (width / (keys[slow].norm(dim=1, keepdim=True) ** 2 * width)) ** 0.5
        written = torch.zeros((hidden, q)), torch.zeros((hidden, inner))
        written[0][out] = matrix(OUT, q, everything, 0.1)
        written[1][out] = matrix(OUT, inner, everything, 0.05)
        weights |= {
            _name(i, "q_proj"): torch.zeros((q, hidden)),
            _name(i, "k_proj"): keys,
            _name(i, "v_proj"): matrix(kv, hidden, noise, float(width) ** 0.5),
            _name(i, "o_proj"): written[0],
            f"model.layers.{i}.mlp.gate_proj.weight": matrix(inner, hidden, everything),
            f"model.layers.{i}.mlp.up_proj.weight": matrix(inner, hidden, everything),
            f"model.layers.{i}.mlp.down_proj.weight": written[1],
            f"model.layers.{i}.input_layernorm.weight": torch.ones(hidden),
            f"model.layers.{i}.post_attention_layernorm.weight": torch.ones(hidden),
        }
    return weights


def _set_scales(weights: Weights, task: int, scales: FloatArray) -> None:
    """Queries of a task: its dimension times the scale, before attention divides by sqrt(D)."""
    constant = weights["model.embed_tokens.weight"][:, task].max()
    for i, row in enumerate(scales):
        per_query = torch.from_numpy(np.repeat(row, SHAPE.group_size)).float()
        weights[_name(i, "q_proj")][_slow(SHAPE.num_q_heads), task] = (
            per_query * SHAPE.head_dim**0.5 / constant
        )


def _slow(heads: int) -> torch.Tensor:
    """Rows of a projection that hold the heads' slowest rotary dimension."""
    return torch.arange(heads) * SHAPE.head_dim + SHAPE.head_dim // 2 - 1


def _name(layer: int, projection: str) -> str:
    return f"model.layers.{layer}.self_attn.{projection}.weight"
