# SPDX-License-Identifier: Apache-2.0
"""Decode kernels that are compared: ours, and FlashInfer's own wrapper on the same head pages.

All see the same problem: row i of a batch is one (request, head), lane l of `HeadPages` is layer l,
row i + 1 of its tables holds row i, and no row is empty. The heads are folded into the batch: one
KV head and `group` query heads for each row. UNTESTED ON A GPU; what is handed to FlashInfer's
wrapper is checked against a model of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fairkv_sglang.bench.gpu.report import require
from fairkv_sglang.kernels import PAGE_TOKENS, HeadPages
from fairkv_sglang.kernels.cuda.workspace import own_plan_bytes

LEAST_WORKSPACE = 128 << 20
"""What FlashInfer's documentation asks for."""


@dataclass(frozen=True)
class Contender:
    """A decode kernel for all layers of one problem.

    Attributes:
        run: ``(layer, q, out)``: attention of one layer; q, out: [rows, group, D].
        plan: What has to be done once per step before the layers run; None: nothing.
        plans_on: "host" or "device".
    """

    run: Callable[[int, torch.Tensor, torch.Tensor], object]
    plan: Callable[[], object] | None = None
    plans_on: str = "device"


def ours(pages: HeadPages, group: int, scale: float, **options: Any) -> Contender:
    """FlashInfer's kernel with the plan made on the device, as serving runs it; options are those
    of `FlashInferDecoder`.
    """
    require("flashinfer", "FlashInfer")
    from fairkv_sglang.kernels.cuda.flashinfer import FlashInferDecoder

    batch, lanes = torch.arange(1, pages.rows, device=pages.device), list(range(pages.lanes + 1))
    decoder = FlashInferDecoder(pages, lanes, group, **options)
    return Contender(
        lambda i, q, out: decoder.decode(q, batch, i, 1, scale, out), lambda: decoder.plan(batch)
    )


def triton(pages: HeadPages, group: int, scale: float) -> Contender:
    """The fallback without FlashInfer: no plan, one program for each row."""
    require("triton", "Triton")
    from fairkv_sglang.kernels.cuda import attention

    batch = torch.arange(1, pages.rows, device=pages.device)
    return Contender(lambda i, q, out: attention.decode(pages, q, batch, i, 1, scale, out))


def stock(pages: HeadPages, group: int, scale: float) -> Contender:
    """FlashInfer's decode wrapper on tensor cores, planned by FlashInfer on the host per layer."""
    require("flashinfer", "FlashInfer")
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    # Layers run one after the other and can share what holds partial results.
    need = own_plan_bytes(pages.rows - 1, group, pages.head_dim, _processors(pages.device))
    workspace = torch.zeros(max(need, LEAST_WORKSPACE), dtype=torch.uint8, device=pages.device)
    wrappers = [
        BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True, backend="fa2")
        for _ in range(pages.lanes)
    ]
    cache = (pages.k_pages.unsqueeze(2), pages.v_pages.unsqueeze(2))
    lists = [_page_lists(pages, layer) for layer in range(pages.lanes)]

    def plan() -> None:
        for wrapper, of_layer in zip(wrappers, lists, strict=True):
            wrapper.plan(
                *of_layer, group, 1, pages.head_dim, PAGE_TOKENS,
                q_data_type=pages.dtype, kv_data_type=pages.dtype, sm_scale=scale,
            )  # fmt: skip

    return Contender(lambda i, q, out: wrappers[i].run(q, cache, out=out), plan, "host")


def _processors(device: torch.device) -> int:
    on_cuda = device.type == "cuda"
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if on_cuda else 1


def _page_lists(pages: HeadPages, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int32 indptr [rows + 1] on the host, page ids on the device, lengths of the last pages."""
    lens = pages.lens[1:, layer]
    held = (lens + (PAGE_TOKENS - 1)) // PAGE_TOKENS
    number = torch.arange(int(held.max()), device=pages.device)[None]
    rows = torch.arange(1, pages.rows, device=pages.device)[:, None]
    indices = pages.page(rows, layer, number)[number < held[:, None]]
    indptr = torch.nn.functional.pad(held.cumsum(0), (1, 0)).int()
    return indptr.cpu(), indices, ((lens - 1) % PAGE_TOKENS + 1).cpu()


Maker = Callable[[HeadPages, int, float], Contender]
CONTENDERS: dict[str, Maker] = {"ours": ours, "stock": stock, "our Triton": triton}
"""By the column of the table."""
