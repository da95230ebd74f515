# SPDX-License-Identifier: Apache-2.0
"""Small SGLang plugins for tests: a folder with a distribution of its own, for ``PYTHONPATH``."""

from __future__ import annotations

from pathlib import Path


def install_plugin(folder: Path, name: str, code: str) -> Path:
    """Write a distribution whose plugin ``name`` runs ``code`` in every rank's process.

    Args:
        folder: What goes onto ``PYTHONPATH``.
        name: Of the distribution, its module and its entry point.
        code: Body of the plugin; ``mark`` says on standard error what the test looks for.

    Returns:
        ``folder``.
    """
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:register\n")
    body = "".join(f"    {line}\n" for line in code.strip().splitlines())
    (folder / f"{name}.py").write_text(
        "import multiprocessing, os, sys\n\n"
        "def mark(*words):\n"  # in one piece: all ranks write to the same file
        "    os.write(2, (' '.join(map(str, ('PROBE', *words))) + '\\n').encode())\n\n"
        "def register():\n"
        "    if multiprocessing.parent_process() is None:\n        return\n" + body
    )
    return folder


PROBE = """
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
def look(result, scheduler, *args, **kwargs):
    runner = scheduler.tp_worker.model_runner
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    for item in (scheduler.tree_cache, runner.attn_backend, pool, scheduler.req_to_token_pool):
        mark("class", type(item).__module__, type(item).__name__)
    mark("hooks", *sorted(HookRegistry._hooks))
    mark("modules", *sorted(name for name in sys.modules if name.startswith("fairkv_sglang")))
HookRegistry.register(
    "sglang.srt.managers.scheduler.Scheduler.__init__", look, HookType.AFTER
)
"""
"""Says which classes a rank was built from, which hooks are registered, what was imported."""

PREFILL_PROBE = """
import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
def rank():
    return f"rank {torch.distributed.get_rank()}"
def pools(result, scheduler, *args, **kwargs):
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    for buffers in (pool.k_buffer, pool.v_buffer):
        for layer, buffer in enumerate(buffers):
            shape, stride = tuple(buffer.shape), buffer.stride()
            mark("pool", rank(), type(pool), "layer", layer, shape, stride, buffer.dtype)
    mark("allocator", rank(), type(scheduler.token_to_kv_pool_allocator))
def attention(which):
    def look(backend, q, k, v, layer, *args, **kwargs):
        heads = (layer.tp_q_head_num, layer.tp_k_head_num)
        mark(which, rank(), type(backend), "layer", layer.layer_id, tuple(q.shape), heads)
    return look
HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.__init__", pools, HookType.AFTER)
backend = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend."
for name in ("forward_extend", "forward_decode"):
    HookRegistry.register(backend + name, attention(name), HookType.BEFORE)
"""
"""Says what SGLang's pool is made of, and each call of its attention backend with its tensors."""

ABORT_PROBE = """
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
def abort(scheduler, *args, **kwargs):
    batch = scheduler.last_batch
    if batch is None or not batch.forward_mode.is_extend():
        return
    for req, cached, new in zip(batch.reqs, batch.prefix_lens, batch.extend_lens):
        ends = cached + new == len(req.full_untruncated_fill_ids)
        if req.rid.startswith("abort-at-once") and ends and not (req.to_finish or req.finished()):
            mark("aborted", req.rid, "with", len(req.output_ids), "tokens")
            scheduler.abort_request(AbortReq(rid=req.rid))
            assert req.to_finish is not None
HookRegistry.register(
    "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run", abort, HookType.BEFORE
)
"""
"""Aborts requests of that name between the pass in which their prompt ends and the next step, where
an abort from outside would be read, on every rank."""

LINGER_PROBE = """
import time
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
def linger(scheduler, *args, **kwargs):
    batch = scheduler.last_batch
    asked = [req.rid for req in batch.reqs if not req.finished()] if batch else []
    asked = [rid for rid in asked if rid.startswith("linger-")]
    for rid in asked:
        mark("lingers", rid)
    time.sleep(max((float(rid.split("-")[1]) for rid in asked), default=0.0))
HookRegistry.register(
    "sglang.srt.managers.scheduler.Scheduler.get_next_batch_to_run", linger, HookType.BEFORE
)
"""
"""Waits after each pass of a request named ``linger-SECONDS-...``, and says so: what a test does in
the middle of it arrives in the middle of it, however busy the machine is.
"""

KEPT_PROBE = """
import json
from fairkv_sglang.attention.choose import Chooser
original = Chooser._pick
def pick(chooser, layer, *args):
    kept = original(chooser, layer, *args)
    rows = [[t for t in row if t >= 0] for row in kept.indices.tolist()]
    mark("kept", json.dumps([layer, list(map(int, chooser.heads.home)), rows]))
    return kept
Chooser._pick = pick
"""
"""Says what each home head keeps of a prompt."""

EXACT_SUMS = """
import torch
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers import linear, logits_processor
from sglang.srt.layers.quantization import unquant
weights = {}
def grid(x):
    return (x.double() * 2.0**20).round() * 2.0**-20
def exact(x, weight):
    key = weight.data_ptr(), weight.shape
    if key not in weights:
        mark("exact", *weight.shape)
        weights[key] = grid(weight)
    return torch.nn.functional.linear(grid(x), weights[key])
def column(method, layer, x, bias=None):
    assert bias is None
    return exact(x, layer.weight).to(x.dtype)
def row(layer, x, *args, **kwargs):
    assert layer.input_is_parallel and layer.bias is None
    total = exact(x, layer.weight)
    if layer.reduce_results and layer.tp_size > 1:
        total = get_tp_group().all_reduce(total)
    return total.to(x.dtype), None
def logits(processor, x, head, *args):
    return exact(x, head.weight).to(x.dtype)
unquant.UnquantizedLinearMethod.apply = column
linear.RowParallelLinear.forward = row
logits_processor.LogitsProcessor._compute_lm_head = logits
"""
"""A dense model's sums, in any order and over any number of ranks, are the same bits.

Factors are rounded to multiples of 2**-20, so products are multiples of 2**-40, and sums of them
below 2**13 exact in float64. What still differs between TP sizes is FairKV's. For models without
biases whose weights stay.
"""
