# SPDX-License-Identifier: Apache-2.0
"""Dispatch: prompts on SGLang's module, decode on its twin, mixed batches on both."""

from __future__ import annotations

import inspect
import pydoc
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import sglang.srt.distributed
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

from fairkv_sglang.architectures import ARCHITECTURES, Architecture
from fairkv_sglang.attention.forward_spans import ForwardSpans, PromptSpan
from fairkv_sglang.parallel.twins import TWIN
from fairkv_sglang.patches import models, registries
from fairkv_tests.attention_module import class_of


class Calls:
    """SGLang's forward: the module's factor times the hidden states; remembers who was called."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, torch.Tensor, Any]] = []

    def __call__(
        self,
        module: Any,
        positions: Any,
        hidden: torch.Tensor,
        forward_batch: Any,
        position_embeddings: Any = None,
    ) -> Any:
        assert positions.tolist() == forward_batch.positions.tolist()
        self.seen.append((module, positions, forward_batch))
        for rotation in position_embeddings or ():  # as the test made them
            assert rotation[..., 0].tolist() == positions.tolist()
        return hidden * module.factor


def pair(same: bool = False) -> tuple[SimpleNamespace, SimpleNamespace]:
    twin = SimpleNamespace(factor=100.0)
    module = SimpleNamespace(factor=1.0)
    setattr(module, TWIN, module if same else twin)
    return module, getattr(module, TWIN)


def batch_of(mode: ForwardMode, lengths: list[int]) -> SimpleNamespace:
    tokens = sum(lengths)
    return SimpleNamespace(
        forward_mode=mode,
        batch_size=len(lengths),
        req_pool_indices=torch.arange(1, len(lengths) + 1),
        seq_lens=torch.tensor(lengths) + 7,
        seq_lens_cpu=torch.tensor(lengths) + 7,
        seq_lens_sum=tokens + 7 * len(lengths),
        extend_seq_lens=torch.tensor(lengths),
        extend_seq_lens_cpu=lengths,
        extend_num_tokens=tokens,
        input_ids=torch.arange(tokens),
        positions=torch.arange(tokens) + 40,
        out_cache_loc=torch.arange(tokens) + 900,
    )


def forward(
    module: Any, batch: SimpleNamespace, spans: ForwardSpans, scores: Any = None
) -> tuple[torch.Tensor, torch.Tensor, Calls]:
    calls, hidden = Calls(), torch.rand(len(batch.positions), 3)
    compressor = SimpleNamespace(hidden=scores)
    rank = SimpleNamespace(backend=SimpleNamespace(spans=spans, compressor=compressor))
    with mock.patch.object(models, "this_rank", lambda: rank):
        out = models.around_attention_forward(calls, module, batch.positions, hidden, batch)
    return out, hidden, calls


def plan_of(prompts: list[int], running: int) -> ForwardSpans:
    spans = [PromptSpan(row, 0, n, n, n) for row, n in enumerate(prompts, 1)]
    first = len(prompts) + 1
    return ForwardSpans(tuple(spans), tuple(range(first, first + running)))


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.IDLE])
@pytest.mark.parametrize("spans", [ForwardSpans(), plan_of([3, 2], 0)], ids=["0", "2"])
def test_prompts_run_on_sglangs_module(mode: ForwardMode, spans: ForwardSpans) -> None:
    module, _ = pair()
    batch = batch_of(mode, [3, 2])
    out, hidden, calls = forward(module, batch, spans)
    assert torch.equal(out, hidden)
    ((who, positions, seen),) = calls.seen
    assert who is module and seen is batch and positions is batch.positions  # nothing is copied


@pytest.mark.parametrize("spans", [ForwardSpans(), plan_of([3, 2], 2)], ids=["none", "stale"])
@pytest.mark.parametrize("same", [False, True], ids=["twin", "itself"])
def test_decode_runs_on_the_twin(spans: ForwardSpans, same: bool) -> None:
    module, twin = pair(same)
    batch = batch_of(ForwardMode.DECODE, [1, 1, 1])
    out, hidden, calls = forward(module, batch, spans)
    assert torch.equal(out, hidden * twin.factor)
    ((who, _, seen),) = calls.seen
    assert who is twin and seen is batch


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.DECODE, ForwardMode.MIXED])
def test_a_twin_has_no_twin(mode: ForwardMode) -> None:
    """Also SGLang's module until twins are built: a pass before that has no state of the rank."""
    module = SimpleNamespace(factor=3.0)
    calls, batch = Calls(), batch_of(mode, [1, 1])
    out = models.around_attention_forward(calls, module, batch.positions, torch.ones(2, 3), batch)
    assert torch.equal(out, torch.full((2, 3), 3.0))
    assert calls.seen[0][0] is module and calls.seen[0][2] is batch


@given(
    prompts=st.lists(st.integers(1, 9), min_size=0, max_size=4),
    running=st.integers(1, 5),
    same=st.booleans(),
)
def test_a_mixed_batch_is_cut_and_joined(prompts: list[int], running: int, same: bool) -> None:
    module, twin = pair(same)
    batch = batch_of(ForwardMode.MIXED, [*prompts, *[1] * running])
    before = dict(vars(batch))
    out, hidden, calls = forward(module, batch, plan_of(prompts, running))
    cut = sum(prompts)
    assert out.shape == hidden.shape
    assert torch.equal(out[:cut], hidden[:cut] * module.factor)
    assert torch.equal(out[cut:], hidden[cut:] * twin.factor)
    (first, _, of_prompts), (second, _, of_running) = calls.seen
    assert first is module and second is twin
    assert of_prompts.forward_mode.is_extend() and of_running.forward_mode.is_decode()
    assert of_prompts.batch_size == len(prompts) and of_running.batch_size == running
    assert of_prompts.extend_seq_lens_cpu == prompts
    rows = torch.cat([of_prompts.req_pool_indices, of_running.req_pool_indices])
    assert torch.equal(rows, batch.req_pool_indices)
    slots = torch.cat([of_prompts.out_cache_loc, of_running.out_cache_loc])
    assert torch.equal(slots, batch.out_cache_loc)
    assert vars(batch) == before


@pytest.mark.parametrize("given", [True, False], ids=["table", "None"])
def test_rotations_that_come_with_a_call_are_cut(given: bool) -> None:
    """Gemma 3's; positions have a dimension more there. With AMX it passes None."""
    module, twin = pair()
    batch = batch_of(ForwardMode.MIXED, [3, 2, 1, 1])
    batch.positions = batch.positions[None]
    rotations = tuple(batch.positions[..., None].repeat(1, 1, 4) for _ in "cs") if given else None
    calls, hidden, spans = Calls(), torch.rand(7, 3), plan_of([3, 2], 2)
    backend = SimpleNamespace(spans=spans, compressor=SimpleNamespace(hidden=None))
    rank = SimpleNamespace(backend=backend)

    def cut(forward_batch: Any, *args: Any) -> SimpleNamespace:
        made = real[cuts.pop(0)](forward_batch, *args)
        made.positions = batch.positions[:, :5] if cuts else batch.positions[:, 5:]
        return made

    real, cuts = (models.prompts_only, models.running_only), [0, 1]
    with (
        mock.patch.object(models, "this_rank", lambda: rank),
        mock.patch.multiple(models, prompts_only=cut, running_only=cut),
    ):
        out = models.around_attention_forward(
            calls, module, batch.positions, hidden, batch, position_embeddings=rotations
        )
    assert torch.equal(out, torch.cat([hidden[:5], hidden[5:] * twin.factor]))
    assert [who for who, *_ in calls.seen] == [module, twin]


@pytest.mark.parametrize("running", [0, 2])
@pytest.mark.parametrize("prompts", [[], [3, 2]], ids=["none", "two"])
def test_hidden_states_of_prompts_are_scored_first(prompts: list[int], running: int) -> None:
    """A layer is compressed in its forward. Running requests have no slots to put scores to."""
    module, _ = pair()
    module.attn = SimpleNamespace(layer_id=7)
    added: list[tuple[int, torch.Tensor, list[int]]] = []

    class Scores:
        def add(self, layer: int, hidden: torch.Tensor, slots: torch.Tensor) -> None:
            assert module.factor == 1.0
            added.append((layer, hidden, slots.tolist()))
            module.factor = 2.0

    mode = ForwardMode.MIXED if prompts else ForwardMode.DECODE
    batch = batch_of(mode, [*prompts, *[1] * (running or 1 - bool(prompts))])
    out, hidden, _ = forward(module, batch, plan_of(prompts, running), Scores())
    if not prompts:
        assert not added
        return
    ((layer, states, slots),) = added
    assert layer == 7 and torch.equal(states, hidden[:5])
    assert slots == batch.out_cache_loc[:5].tolist()
    assert torch.equal(out[:5], hidden[:5] * 2.0)


def test_gpt_oss_leaves_k_and_v_to_the_attention_backend() -> None:
    """On CUDA it would write them to SGLang's pool beside the rotation."""
    from sglang.srt.models import gpt_oss

    attn = mock.Mock(return_value=torch.ones(1))
    module = SimpleNamespace(attn=attn, sinks=torch.ones(2), o_proj=lambda x: (x, None))
    name = "enable_fused_set_kv_buffer"
    with mock.patch.object(gpt_oss, name, models.replace_fused_set_kv_buffer):
        gpt_oss.GptOssAttention.forward_core(module, (None, None, ("q", "k", "v", "batch")))
    attn.assert_called_once_with("q", "k", "v", "batch", sinks=module.sinks, save_kv_cache=True)
    assert f"sglang.srt.models.gpt_oss.{name}" in {hook.target for hook in models.HOOKS}


@pytest.mark.parametrize("scales", [1, 5], ids=["one", "each"])
def test_hidden_states_that_a_norm_has_quantised_are_cut(scales: int) -> None:
    """Rows go with their scales; one scale for all, and a type, belong to both parts."""
    rows, scale = torch.rand(5, 3), torch.rand(scales, 1)
    first, second = models._cut((rows, scale, torch.bfloat16), 2)
    assert torch.equal(torch.cat([first[0], second[0]]), rows) and len(first[0]) == 2
    assert first[2] is second[2] is torch.bfloat16
    if scales == 1:
        assert first[1] is second[1] is scale
    else:
        assert torch.equal(torch.cat([first[1], second[1]]), scale) and len(first[1]) == 2


def test_rotations_that_a_scorer_can_undo() -> None:
    """LongRoPE has a table for short and one for long batches; Gemma 3 may scale its positions in
    another place than where its attention has a table.
    """
    model, attention = torch.nn.Module(), torch.nn.Module()
    attention.rotary_emb = torch.nn.Module()
    with pytest.raises(RuntimeError, match=r"FairKV: .*LongRoPE.* has two; use --fairkv-scorer"):
        registries._rope(attention, model)
    model.model = torch.nn.Module()
    model.model.rotary_emb = SimpleNamespace(rope_type="linear")
    with pytest.raises(RuntimeError, match=r"FairKV: .*scales its positions \(linear\); use"):
        registries._rope(attention, model)
    model.model.rotary_emb.rope_type = "default"
    table = torch.ones(3, 4)
    attention.rotary_emb.cos_sin_cache, attention.rotary_emb.is_neox_style = table, False
    rope = registries._rope(attention, model)
    assert rope.table() is table and not rope.halves


class Twins:
    """Instead of the rank's own; remembers what it is made of."""

    def __init__(
        self, modules: list[Any], heads: Any, head_dim: int, group: Any, fixed_width: bool
    ) -> None:
        self.layers = [module.attn.layer_id for module in modules]
        self.group, self.fixed_width, self.built = group, fixed_width, False

    def build(self) -> None:
        self.built = True

    def describe(self) -> str:
        return "twins"


def rank_of(layers: int, tp_size: int) -> SimpleNamespace:
    """What the hook on the loaded model asks of a rank."""
    model = SimpleNamespace(num_layers=layers, head_dim=8)
    start = SimpleNamespace(device="cpu")
    scorer = SimpleNamespace(reads_hidden=False)
    return SimpleNamespace(model=model, start=start, tp_size=tp_size, heads=None, scorer=scorer)


def load(layers: list[int], rank: SimpleNamespace) -> torch.nn.Module:
    kind = class_of(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 2),
        *(torch.nn.ModuleList([kind(layer_id=i, num_heads=2, num_kv_heads=1)]) for i in layers),
    )
    group = SimpleNamespace(device_group="the ranks")
    for module in model[1:]:
        module[0].compatible_with_fused_kv_buffer = True
    classes = (f"{kind.__module__}.{kind.__qualname__}",)
    with (
        mock.patch.object(models, "attention_classes", lambda: classes),
        mock.patch.object(models, "this_rank", lambda: rank),
        mock.patch.object(models, "TwinWeights", Twins),
        mock.patch.object(sglang.srt.distributed, "get_tp_group", lambda: group),
    ):
        models.after_load_model(None, SimpleNamespace(model=model))
    return model


@pytest.mark.parametrize(("tp_size", "group"), [(1, None), (2, "the ranks")])
def test_twins_are_built_layer_by_layer(tp_size: int, group: str | None) -> None:
    rank = rank_of(3, tp_size)
    model = load([2, 0, 1], rank)
    assert rank.twins.built and rank.twins.layers == [0, 1, 2]
    assert rank.twins.group == group and not rank.twins.fixed_width
    # Decode, which may run on SGLang's module itself, has no slots to write K and V to.
    assert not any(module[0].compatible_with_fused_kv_buffer for module in model[1:])


@pytest.mark.parametrize("layers", [[], [0, 2], [0, 1, 2, 3]], ids=str)
def test_a_model_with_other_layers_is_refused(layers: list[int]) -> None:
    rank = rank_of(3, 1)
    with pytest.raises(RuntimeError, match=r"found attention of layers \[.*the plan has 3 layers"):
        load(layers, rank)
    assert not hasattr(rank, "twins")


@pytest.fixture
def refreshed() -> Iterator[list[int]]:
    calls: list[int] = []
    rank = rank_of(1, 1)
    rank.twins = SimpleNamespace(refresh=lambda: calls.append(1))
    with mock.patch.object(models, "this_rank", lambda: rank):
        yield calls


@pytest.mark.parametrize("result", [(True, "done"), (False, "half way"), None], ids=str)
def test_twins_follow_an_update_and_a_failed_one(result: Any, refreshed: list[int]) -> None:
    """What a failed update left in the homes, decode has to compute with, too."""
    assert models.after_weight_update(result, object(), "model", load_format="auto") is result
    assert refreshed == [1]


def test_an_update_before_twins_exist() -> None:
    with mock.patch.object(models, "this_rank", lambda: rank_of(1, 1)):
        assert models.after_weight_update((True, ""), object()) == (True, "")


def test_all_ways_of_updating_weights_are_hooked() -> None:
    """A way that SGLang adds would leave twins with old weights."""
    hooked = {hook.target.rpartition(".")[2] for hook in models.HOOKS if "Updater" in hook.target}
    public = {name for name, _ in inspect.getmembers(WeightUpdater, inspect.isfunction)}
    changing = {name for name in public if name.startswith(("update_weights", "load_weights"))}
    assert hooked == changing | {"end_weight_update"}
    known = {"init_weights_update_group", "destroy_weights_update_group", "begin_weight_update"}
    known |= {"receive_weights_from_distributed"}
    assert {name for name in public if not name.startswith("_")} == hooked | known


@pytest.mark.parametrize("row", ARCHITECTURES.values(), ids=lambda row: row.name)
def test_attention_of_every_served_architecture_is_hooked(row: Architecture) -> None:
    """And is what the hooks and the twins expect of it."""
    model, attention = (pydoc.locate(path) for path in (row.model, row.attention))
    assert isinstance(model, type) and isinstance(attention, type)
    assert model.__name__ == row.name
    targets = {hook.target for hook in models.HOOKS}
    assert f"{row.attention}.forward" in targets
    # By these names SGLang passes what the dispatch takes apart.
    names = inspect.signature(attention.forward).parameters
    assert [name for name in names if name not in ("position_embeddings", "kwargs")] == [
        "self", "positions", "hidden_states", "forward_batch",
    ]  # fmt: skip
    # What a twin has for itself; it shares all else with SGLang's module.
    own = {"num_heads", "num_kv_heads", "q_size", "kv_size", "qkv_proj", "o_proj", "attn"}
    assert own | {"head_dim"} <= set(attention.__init__.__code__.co_names)
    # The class that the model's layers build, not one that merely exists.
    layers = {m for kind in model.__mro__ for m in [sys.modules.get(kind.__module__)] if m}
    assert any(getattr(module, attention.__name__, None) is attention for module in layers)
