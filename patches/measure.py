# SPDX-License-Identifier: Apache-2.0
"""Measuring, for ``fairkv bench``: time in collectives and between them, and of compression.

In effect only when ``FAIRKV_MEASURE_WAIT=1`` is set, with FairKV on or off, so that stock SGLang is
measured with the same clock. On CUDA every mark waits for the device, which is right for finding
out who waits for whom but slows the step down, and passes in a CUDA graph are not cut
(``--disable-cuda-graph``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

from fairkv_sglang.patches.ledger import Hook, verify
from fairkv_sglang.patches.stretches import StretchRecorder

if TYPE_CHECKING:  # nothing of FairKV's runtime is loaded where stock SGLang is measured
    from fairkv_sglang.attention.compress import PromptCompressor

VARIABLE = "FAIRKV_MEASURE_WAIT"
STATE = "fairkv_measure"
"""Key in the scheduler's internal state: what each rank has recorded, by rank."""

_recorder = StretchRecorder()
seconds = {"prefill_seconds": 0.0, "compress_seconds": 0.0, "hand_over_seconds": 0.0}
"""Host time of this rank since its start, on CUDA that of launches: all of its prefill passes; of
that scoring, selection and handing over; of that packing, waiting for and storing what travels."""


def is_asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment turns measuring on."""
    return environment.get(VARIABLE, "") == "1"


def _mark(on_cuda: bool) -> None:
    if on_cuda:
        if torch.cuda.is_current_stream_capturing():
            return
        torch.cuda.synchronize()
    _recorder.mark()


def around_all_reduce(original: Any, group: Any, input_: Any, *args: Any, **kwargs: Any) -> Any:
    """Marks on both sides of an all-reduce of a decode step."""
    if group.world_size == 1 or not _recorder.in_step:
        return original(group, input_, *args, **kwargs)
    _mark(input_.is_cuda)
    result = original(group, input_, *args, **kwargs)
    _mark(input_.is_cuda)
    return result


def around_forward(
    original: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """One forward pass: a decode step is cut at its collectives, a prefill pass is summed up."""
    _recorder.forwards += 1
    on_cuda = str(runner.device).startswith("cuda")
    if not forward_batch.forward_mode.is_decode():
        started = time.perf_counter()
        result = original(runner, forward_batch, *args, **kwargs)
        took = time.perf_counter() - started
        _recorder.prefill_seconds += took
        seconds["prefill_seconds"] += took
        return result
    if on_cuda:
        torch.cuda.synchronize()
    _recorder.begin(forward_batch.batch_size)
    try:
        return original(runner, forward_batch, *args, **kwargs)
    finally:
        if on_cuda:
            torch.cuda.synchronize()
        if _recorder.end():
            _recorder.loads = _resident_tokens()


def _resident_tokens() -> Any:
    """``[L][R]`` kept tokens that each rank reads now; None without FairKV."""
    from fairkv_sglang.patches.rank import this_rank

    try:
        return this_rank().book.router.loads().tolist()
    except RuntimeError:
        return None


def time_compression(compressor: PromptCompressor) -> None:
    """Run the stopwatches of compression and hand-over."""
    hand_over = compressor.hand_over
    for owner, method, name in (
        (compressor, "layer", "compress_seconds"),
        (hand_over, "send", "hand_over_seconds"),
        (hand_over, "finish", "hand_over_seconds"),
    ):
        setattr(owner, method, _timed(getattr(owner, method), name))


def _timed(method: Callable[..., None], name: str) -> Callable[..., None]:
    @wraps(method)
    def run(*args: Any) -> None:
        started = time.perf_counter()
        method(*args)
        seconds[name] += time.perf_counter() - started

    return run


def after_get_internal_state(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """What all ranks have recorded since the last request of this kind.

    Every rank gets the request in the same order, so the collective inside is safe.
    """
    import torch.distributed as dist

    verify(HOOKS)
    ranks: list[Any] = [_recorder.take()]
    size = scheduler.tp_group.world_size
    if size > 1:
        mine = ranks[0]
        ranks = [None] * size
        dist.all_gather_object(ranks, mine, group=scheduler.tp_cpu_group)
    result.internal_state[STATE] = ranks
    return result


_TEST = "tests/bench/test_engine_bench.py"

HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.distributed.parallel_state.GroupCoordinator.all_reduce",
        kind="around",
        function=around_all_reduce,
        why="measuring only: how long a rank waits for slower ones in each all-reduce",
        since="0.5.17",
        upstream="sglang/srt/distributed/parallel_state.py",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.model_executor.model_runner.ModelRunner.forward",
        kind="around",
        function=around_forward,
        why="measuring only: where a decode step begins and ends",
        since="0.5.17",
        upstream="sglang/srt/model_executor/model_runner.py",
        test=_TEST,
    ),
    Hook(
        target="sglang.srt.managers.scheduler.Scheduler.get_internal_state",
        kind="after",
        function=after_get_internal_state,
        why="measuring only: the result travels on SGLang's own control channel",
        since="0.5.17",
        upstream="sglang/srt/managers/scheduler.py",
        test=_TEST,
    ),
)
