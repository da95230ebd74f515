# SPDX-License-Identifier: Apache-2.0
"""The rank remapper: any placement computes what the unsplit layer computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_cases import QUICK, random_owners, random_plan, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from fairkv_sglang.parallel import RankHeads, attention_kwargs, remap_weights
from fairkv_sglang.placement import Plan

DIM, HIDDEN, TOKENS, LAYER = 4, 12, 9, 1
NAME = f"model.layers.{LAYER}.self_attn."


def layer_weights(heads: int, group: int, bias: bool, seed: int) -> dict[str, torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    rows = {"q": heads * group * DIM, "k": heads * DIM, "v": heads * DIM}
    weights = {
        f"{NAME}{p}_proj.weight": torch.randn(n, HIDDEN, generator=make).double()
        for p, n in rows.items()
    }
    if bias:
        for p, n in rows.items():
            weights[f"{NAME}{p}_proj.bias"] = torch.randn(n, generator=make).double()
    weights[f"{NAME}o_proj.weight"] = torch.randn(HIDDEN, rows["q"], generator=make).double()
    return weights


def attention(
    x: torch.Tensor, weights: dict[str, torch.Tensor], group: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Causal GQA of as many heads as the weights have; ``mask`` [n] switches heads off."""

    def project(name: str) -> torch.Tensor:
        out = x @ weights[f"{NAME}{name}_proj.weight"].T
        return (out + weights.get(f"{NAME}{name}_proj.bias", 0.0)).view(len(x), -1, DIM)

    q, k, v = project("q"), project("k"), project("v")
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    logits = torch.einsum("ihd,jhd->hij", q, k) * DIM**-0.5
    hidden = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    out = torch.einsum("hij,jhd->ihd", logits.masked_fill(hidden, -torch.inf).softmax(-1), v)
    if mask is not None:
        out = out * mask.repeat_interleave(group)[None, :, None]
    return out.reshape(len(x), -1) @ weights[f"{NAME}o_proj.weight"].T


@settings(QUICK, max_examples=60)
@given(
    seed=seeds,
    ranks=st.integers(1, 4),
    heads=st.integers(4, 6),
    group=st.integers(1, 3),
    bias=st.booleans(),
)
def test_sum_over_ranks_is_the_unsplit_layer(
    seed: int, ranks: int, heads: int, group: int, bias: bool
) -> None:
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, 2, ranks, heads)
    owners = random_owners(rng, plan)
    weights = layer_weights(heads, group, bias, seed)
    x = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(seed)).double()
    total = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for rank in range(ranks):
        mine = RankHeads(plan, rank, group)
        part = dict(remap_weights(weights.items(), mine, DIM))
        lanes = slice(mine.lane_start[LAYER], mine.lane_start[LAYER + 1])
        served = torch.from_numpy(mine.owned(owners)[lanes])
        assert part[f"{NAME}k_proj.weight"].shape == (len(served) * DIM, HIDDEN)
        total += attention(x, part, group, served)
    torch.testing.assert_close(total, attention(x, weights, group))


def uneven() -> RankHeads:
    shares = np.zeros((2, 2, 4))
    shares[:, 0, [0, 2, 3]], shares[:, 1, 1] = 1, 1
    return RankHeads(Plan.from_shares(shares, "uneven"), 0, 2)


def test_everything_else_passes_unchanged() -> None:
    others = {
        name: torch.zeros(3)
        for name in (
            "model.embed_tokens.weight",
            "model.layers.0.mlp.down_proj.weight",
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            f"{NAME}o_proj.bias",
            "lm_head.weight",
        )
    }
    for name, tensor in remap_weights(others.items(), uneven(), DIM):
        assert tensor is others[name]


@pytest.mark.parametrize("form", ["tensor", "slice"])
def test_rows_and_columns_are_taken_in_plan_order(form: str) -> None:
    weight = torch.arange(4 * DIM, dtype=torch.float32)[:, None].expand(-1, 3).contiguous()
    given = weight if form == "tensor" else weight[:]
    ((_, rows),) = remap_weights([(f"{NAME}v_proj.weight", given)], uneven(), DIM)
    assert (rows[:, 0] // DIM).tolist() == [0.0] * DIM + [2.0] * DIM + [3.0] * DIM
    wide = torch.arange(4 * 2 * DIM, dtype=torch.float32)[None].expand(3, -1).contiguous()
    ((_, columns),) = remap_weights([(f"{NAME}o_proj.weight", wide)], uneven(), DIM)
    assert columns.shape == (3, 3 * 2 * DIM)
    assert columns[0, :: 2 * DIM].tolist() == [0.0, 4.0 * DIM, 6.0 * DIM]


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("q_proj.weight", (4 * DIM, HIDDEN), "has 16 rows or columns of heads, .* expects 32"),
        ("k_proj.weight", (3 * DIM, HIDDEN), "has 12 rows"),
        ("v_proj.bias", (DIM,), "has 4 rows"),
        ("o_proj.weight", (HIDDEN, 4 * DIM), "has 16 rows or columns"),
        ("q_proj.qweight", (8, 8), "use an unquantised checkpoint"),
        ("o_proj.weight_scale_inv", (1,), "use an unquantised checkpoint"),
        ("k_proj.lora_A.weight", (1,), "cannot place"),
        ("qkv_proj.weight", (8 * DIM, HIDDEN), "places q, k and v apart"),
    ],
)
def test_what_would_be_placed_wrongly_is_refused(name: str, shape: tuple, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        list(remap_weights([(NAME + name, torch.zeros(shape))], uneven(), DIM))
    assert NAME + name in str(caught.value) and "\n" not in str(caught.value)


def test_sglang_builds_this_ranks_heads() -> None:
    given = {"layer_id": 1, "num_heads": 8, "num_kv_heads": 4, "config": object()}
    made = attention_kwargs(given, uneven())
    tp_size, heads = 2, 3
    assert made["num_kv_heads"] // tp_size == heads
    assert made["num_heads"] // tp_size == heads * 2
    assert made["config"] is given["config"] and given["num_heads"] == 8
