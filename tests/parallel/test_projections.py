# SPDX-License-Identifier: Apache-2.0
"""Weights of every format are cut along heads: a twin has what a module of its heads would have.

A format is a function from plain numbers to the tensors that SGLang's kernels read; it is applied
to the weights of any list of heads. No kernel runs here: they need a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.layers.quantization.marlin_utils import marlin_permute_scales, marlin_zero_points
from torch import Tensor, nn

from fairkv_sglang.parallel import LaneTable, RankHeads, TwinWeights, twins
from fairkv_sglang.parallel.projections import INPUT, OUTPUT, check, placed
from fairkv_sglang.parallel.twins import TWIN
from fairkv_sglang.placement import Plan
from fairkv_sglang.placement.homes import Homes
from fairkv_tests.core_cases import random_plan
from fairkv_tests.fake_collectives import Group, ranks_as_threads

LAYERS, HIDDEN, DIM, GROUP = 2, 128, 64, 2
FP8 = torch.float8_e4m3fn
Format = Callable[[Tensor, int, int], dict[str, Tensor]]
"""From integers ``[out, in]``, the side of heads and the layer to a projection's tensors.

The numbers of an output or a block are made from the first integer in it, so that they belong to it
wherever it is.
"""


def scale(codes: Tensor) -> Tensor:
    return codes.float() / 256 + 1


def plain(codes: Tensor, side: int, layer: int) -> dict[str, Tensor]:
    return {"weight": codes.bfloat16(), **bias(codes, side, layer)}


def bias(codes: Tensor, side: int, layer: int) -> dict[str, Tensor]:
    if side == OUTPUT:
        return {"bias": scale(codes[:, 1]).bfloat16()}
    return {"bias": torch.full((HIDDEN,), float(layer), dtype=torch.bfloat16)}


def fp8(codes: Tensor) -> Tensor:
    return codes.to(torch.uint8).remainder(120).view(FP8)


def fp8_by_tensor(codes: Tensor, side: int, layer: int) -> dict[str, Tensor]:
    """Fp8LinearMethod and W8A8Fp8 with one scale; static activations have one, too."""
    one = torch.tensor(1.5 + layer)
    return {"weight": fp8(codes).t(), "weight_scale": one, "input_scale": one + side}


def fp8_by_output(codes: Tensor, side: int, layer: int) -> dict[str, Tensor]:
    """W8A8Fp8 with a scale for each output: of heads in q, k, v, of the hidden size in o."""
    scales = scale(codes[:, :1]) if side == OUTPUT else torch.arange(HIDDEN).view(-1, 1) + layer
    return {"weight": fp8(codes).t(), "weight_scale": scales.float(), **bias(codes, side, layer)}


def fp8_in_blocks(codes: Tensor, side: int, layer: int) -> dict[str, Tensor]:
    scales = scale(codes[::32, ::16]).contiguous()
    return {"weight": fp8(codes), "weight_scale_inv": scales, **bias(codes, side, layer)}


def tiles(codes: Tensor, bits: int) -> Tensor:
    """Marlin's of 16 inputs and 64 outputs, the contents of each in some order of their own."""
    out, into = codes.shape
    order = torch.randperm(16 * 64, generator=torch.Generator().manual_seed(7))
    found = codes.t().remainder(1 << bits).view(into // 16, 16, out // 64, 64)
    found = found.transpose(1, 2).reshape(into // 16, out // 64, 1024)[..., order]
    words = found.reshape(into // 16, -1, 32 // bits).long()
    packed = (words << torch.arange(32 // bits) * bits).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).int()


def fp8_for_marlin(codes: Tensor, side: int, layer: int) -> dict[str, Tensor]:
    out, into = codes.shape
    scales = scale(codes[:, 0]) if side == OUTPUT else torch.arange(HIDDEN) + layer
    scales = marlin_permute_scales(scales.view(1, -1).half(), into, out, -1)
    return {"weight": tiles(codes, 8), "weight_scale": scales, **bias(codes, side, layer)}


def marlin(zeros: bool, bits: int = 4, groups_of: int = 32) -> Format:
    def make(codes: Tensor, side: int, layer: int) -> dict[str, Tensor]:
        out, into = codes.shape
        groups = codes.t()[::groups_of]  # [groups, out]
        scales = marlin_permute_scales(scale(groups).half(), into, out, groups_of)
        qweight = tiles(codes, bits)
        points = torch.empty(0, dtype=torch.int32)
        if zeros:
            points = marlin_zero_points(
                groups.remainder(1 << bits).int().contiguous(), into // groups_of, out, bits
            )
        return {"qweight": qweight, "scales": scales, "qzeros": points, **bias(codes, side, layer)}

    return make


FORMATS: dict[str, Format] = {
    "plain": plain,
    "fp8, tensor": fp8_by_tensor,
    "fp8, channel": fp8_by_output,
    "fp8, block": fp8_in_blocks,
    "fp8, Marlin": fp8_for_marlin,
    "awq": marlin(zeros=True),
    "gptq": marlin(zeros=False),
    "gptq, 8 bit": marlin(zeros=False, bits=8),
}


class Linear(nn.Module):
    """What SGLang's linear layers hold; ``scheme`` as GPTQ has it, with the sizes in its kernel."""

    def __init__(self, tensors: dict[str, Tensor], shape: tuple[int, int], scheme: bool) -> None:
        super().__init__()
        self.bias: nn.Parameter | None
        self.register_parameter("bias", None)
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        self.output_size_per_partition, self.input_size_per_partition = shape
        self.workspace = torch.zeros(4)
        if scheme:
            config = Sizes(partition_weight_shape=(shape[1], shape[0]))
            self.scheme = SimpleNamespace(kernel=SimpleNamespace(kernel_config=config))


@dataclasses.dataclass
class Sizes:
    """SGLang's ``MarlinLinearLayerConfig``, as far as it depends on heads: ``[in, out]``."""

    partition_weight_shape: tuple[int, int]


class Model:
    """Integers for all weights of a model; attention modules for any heads of it."""

    def __init__(self, heads: int, form: str, seed: int) -> None:
        self.heads, self.form = heads, form
        make = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randint(0, 256, (LAYERS, heads, *shape), generator=make)

        self.q, self.o = random(GROUP * DIM, HIDDEN), random(HIDDEN, GROUP * DIM)
        self.k, self.v = random(DIM, HIDDEN), random(DIM, HIDDEN)

    def attention(self, layer: int, heads: list[int], queries: slice = slice(None)) -> Any:
        """As SGLang has it after loading, for these heads and these query rows of each."""
        q = self.q[layer, heads][:, queries].flatten(0, 1)
        rows = [q, self.k[layer, heads].flatten(0, 1), self.v[layer, heads].flatten(0, 1)]
        o = self.o[layer, heads][:, :, queries].transpose(0, 1).flatten(1)
        module: Any = nn.Module()
        for name, codes, side in (("qkv_proj", torch.cat(rows), OUTPUT), ("o_proj", o, INPUT)):
            tensors = FORMATS[self.form](codes, side, layer)
            linear = Linear(tensors, tuple(codes.shape), "gptq" in self.form)
            setattr(module, name, linear)
        module.head_dim, module.num_kv_heads = DIM, len(heads)
        module.num_heads = len(q) // DIM
        module.q_size, module.kv_size = len(q), len(heads) * DIM
        module.attn = nn.Module()
        module.attn.layer_id = layer
        module.attn.tp_q_head_num, module.attn.tp_k_head_num = module.num_heads, len(heads)
        module.attn.tp_v_head_num = len(heads)
        return module

    def at_home(self, layer: int, rank: int, ranks: int) -> Any:
        homes = Homes(self.heads, ranks)
        mine = list(homes.heads(rank))
        part = GROUP * DIM // homes.replicas
        first = homes.ranks(mine[0]).index(rank) * part
        return self.attention(layer, mine, slice(first, first + part))


def build(
    model: Model, plan: Plan, slots: int | None = None
) -> tuple[list[list[Any]], list[TwinWeights]]:
    """SGLang's modules of all ranks, with twins."""
    modules = [
        [model.at_home(layer, rank, plan.tp_size) for layer in range(LAYERS)]
        for rank in range(plan.tp_size)
    ]
    made: list[Any] = [None] * plan.tp_size

    def work(rank: int, group: Group | None) -> None:
        heads = RankHeads(plan, rank, GROUP, LaneTable(plan, slots))
        made[rank] = TwinWeights(modules[rank], heads, DIM, group)  # type: ignore[arg-type]
        made[rank].build()

    ranks_as_threads(plan.tp_size, [twins], work)
    return modules, made


def assert_same(found: Any, wanted: Any) -> None:
    """Counts, sizes, and every tensor with its type and strides."""
    for name in ("num_heads", "num_kv_heads", "q_size", "kv_size"):
        assert getattr(found, name) == getattr(wanted, name)
    for name in ("tp_q_head_num", "tp_k_head_num", "tp_v_head_num", "layer_id"):
        assert getattr(found.attn, name) == getattr(wanted.attn, name)
    for name in ("qkv_proj", "o_proj"):
        mine, right = getattr(found, name), getattr(wanted, name)
        assert mine.output_size_per_partition == right.output_size_per_partition
        assert mine.input_size_per_partition == right.input_size_per_partition
        if hasattr(right, "scheme"):
            assert mine.scheme.kernel.kernel_config == right.scheme.kernel.kernel_config
        tensors = dict(right.named_parameters())
        assert dict(mine.named_parameters()).keys() == tensors.keys()
        for key, tensor in tensors.items():
            twin = getattr(mine, key)
            assert (twin.dtype, twin.shape) == (tensor.dtype, tensor.shape), (name, key)
            assert twin.stride() == tensor.stride(), (name, key)
            as_bytes = [t.data.contiguous().view(-1).view(torch.uint8) for t in (twin, tensor)]
            assert torch.equal(*as_bytes), (name, key)


@pytest.mark.parametrize(
    ("heads", "ranks"), [(4, 2), (2, 4), (3, 1)], ids=["even", "copied at home", "one rank"]
)
@pytest.mark.parametrize("form", FORMATS)
def test_a_twin_is_a_module_of_its_heads(form: str, heads: int, ranks: int) -> None:
    """Also after an update of the homes' weights; SGLang's modules stay what they were."""
    plan = random_plan(np.random.default_rng(heads), LAYERS, ranks, heads)
    model = Model(heads, form, seed=1)
    modules, made = build(model, plan)
    other = Model(heads, form, seed=2)
    for version in (model, other):
        for rank in range(ranks):
            for layer in range(LAYERS):
                twin = getattr(modules[rank][layer], TWIN)
                lanes = list(plan.heads(layer, rank))
                assert_same(modules[rank][layer], version.at_home(layer, rank, ranks))
                if twin is not modules[rank][layer]:
                    assert_same(twin, version.attention(layer, lanes))
        if version is model:
            for rank in range(ranks):
                for layer in range(LAYERS):
                    new = other.at_home(layer, rank, ranks)
                    for name in ("qkv_proj", "o_proj"):  # other tensors, not other contents
                        linear = getattr(modules[rank][layer], name)
                        linear._parameters.update(getattr(new, name)._parameters)
            ranks_as_threads(ranks, [twins], lambda rank, group: made[rank].refresh())


@pytest.mark.parametrize("form", FORMATS)
def test_a_narrower_twin_lies_in_the_same_memory(form: str) -> None:
    """Where plans change, a layer's tensors are laid out anew for the slots in use."""
    plan = random_plan(np.random.default_rng(5), LAYERS, 2, 4, copies=False)
    model = Model(4, form, seed=3)
    _, made = build(model, plan, slots=4)
    for rank in range(2):
        for layer in range(LAYERS):
            lanes = list(plan.heads(layer, rank))
            twin = made[rank]._twins[layer][len(lanes)]
            assert_same(twin, model.attention(layer, lanes))
            full = made[rank]._twins[layer][4]
            for name in ("qkv_proj", "o_proj"):
                for key, tensor in getattr(twin, name).named_parameters():
                    assert tensor.data_ptr() == getattr(getattr(full, name), key).data_ptr()


def test_bytes_are_those_of_the_format() -> None:
    """A lane of 4-bit weights costs about a quarter of one in bf16."""
    plan = random_plan(np.random.default_rng(4), LAYERS, 2, 4)
    sizes = {form: build(Model(4, form, 1), plan)[1][0].lane_bytes for form in FORMATS}
    weights = (2 * GROUP + 2) * DIM * HIDDEN
    rows = (GROUP + 2) * DIM  # outputs of q, k and v
    assert sizes["plain"] == 2 * (weights + rows)
    assert sizes["fp8, tensor"] == weights
    assert sizes["fp8, channel"] == weights + (4 + 2) * rows
    assert sizes["fp8, block"] == weights + 4 * weights // (32 * 16) + 2 * rows
    assert sizes["gptq"] == weights // 2 + 2 * weights // 32 + 2 * rows
    assert sizes["awq"] == sizes["gptq"] + weights // 32 // 2


@pytest.mark.parametrize(
    ("form", "change", "says"),
    [
        ("fp8, block", {"weight_scale_inv": (3, 8)}, "cut out of weight_scale_inv"),
        ("gptq", {"scales": (1, 512)}, "cut out of scales"),
        ("plain", {"weight_packed": (8, 8)}, "in a form that it cannot cut: .*weight_packed"),
    ],
    ids=str,
)
def test_what_cannot_be_cut_is_refused(form: str, change: dict[str, Any], says: str) -> None:
    """Blocks over the border of heads; a single Marlin group; tensors that nobody knows."""
    module = Model(4, form, 1).attention(0, [0, 1])
    linear = module.o_proj if "scales" in change else module.qkv_proj
    for name, shape in change.items():
        setattr(linear, name, nn.Parameter(torch.ones(shape), requires_grad=False))
    with pytest.raises(RuntimeError, match=f"FairKV: .*{says}"):
        check(module, GROUP * DIM)


def test_unknown_types_are_refused() -> None:
    linear = Linear({"weight": torch.zeros(4, 4, dtype=torch.int8)}, (4, 4), scheme=False)
    with pytest.raises(RuntimeError, match=r"cannot cut: weight torch\.int8"):
        placed(linear, OUTPUT)
