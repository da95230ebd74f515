# SPDX-License-Identifier: Apache-2.0
"""Decode kernels that are compared: ours, and others on the same head pages.

All see the same problem: row i of a batch is one (request, head), lane l of `HeadPages` is layer l,
row i + 1 of its tables holds row i, and no row is empty. The heads are folded into the batch: one
KV head and `group` query heads for each row. UNTESTED ON A GPU; on CPU SGLang's kernel runs in
Triton's interpreter, and what is handed to FlashInfer's wrappers is checked against models of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch

from fairkv_sglang.bench.gpu.report import NotRun, require
from fairkv_sglang.kernels import PAGE_TOKENS, HeadPages

WORKSPACE_BYTES = 256 << 20
SGLANG_SPLITS = 8
"""SGLang's default of --triton-attention-num-kv-splits."""


class Contender(ABC):
    """A decode kernel for all layers of one problem."""

    plans_on_host: ClassVar[bool] = False

    def __init__(self, pages: HeadPages, group: int, scale: float) -> None:
        self.pages, self.group, self.scale = pages, group, scale
        self.layers, self.rows = pages.lanes, pages.rows - 1

    def plan(self) -> None:  # noqa: B027 (kernels without a plan have nothing to do)
        """What has to be done once per step before the layers run."""

    @abstractmethod
    def run(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        """Attention of one layer; q, out: [rows, group, D]."""

    def page_lists(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int32 indptr [rows + 1] on the host, page ids and lengths [rows] on the device."""
        lens = self.pages.lens[1:, layer]
        held = (lens + (PAGE_TOKENS - 1)) // PAGE_TOKENS
        column = torch.arange(self.pages.max_pages, device=self.pages.device)
        indices = self.pages.page_table[1:, layer][column < held[:, None]]
        return _starts(held).cpu(), indices, lens.contiguous()


def _starts(counts: torch.Tensor) -> torch.Tensor:
    """int32 [n + 1]: 0 and the running sums."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


class Ours(Contender):
    """FlashInfer's kernel with the plan made on the device, as serving runs it.

    Args:
        tiles: Spare tiles for each multiprocessor; None: what serving takes.
        longest_first: Order of the tiles.
        options: For `FlashInferDecode`.
    """

    def __init__(
        self,
        pages: HeadPages,
        group: int,
        scale: float,
        tiles: int | None = None,
        longest_first: bool = True,
        **options: Any,
    ) -> None:
        require("flashinfer", "FlashInfer")
        from fairkv_sglang.kernels.flashinfer_decode import FlashInferDecode

        super().__init__(pages, group, scale)
        if tiles is not None:
            processors = torch.cuda.get_device_properties(pages.device).multi_processor_count
            options["spare"] = tiles * processors
        lanes = list(range(self.layers + 1))
        self.runner = FlashInferDecode(
            pages, self.rows, lanes, group, scale, longest_first=longest_first, **options
        )
        self.batch = torch.arange(1, pages.rows, device=pages.device)

    def plan(self) -> None:
        self.runner.plan(self.batch)

    def run(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        self.runner.run(layer, q, out)


class OurTriton(Contender):
    """The fallback without FlashInfer: no plan, one program for each row."""

    def __init__(self, pages: HeadPages, group: int, scale: float) -> None:
        require("triton", "Triton")
        super().__init__(pages, group, scale)
        self.batch = torch.arange(1, pages.rows, device=pages.device)

    def run(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        from fairkv_sglang.kernels import triton_decode

        triton_decode.decode(self.pages, q, self.batch, layer, 1, self.scale, out)


class StockFlashInfer(Contender):
    """FlashInfer's decode wrapper on tensor cores, planned by FlashInfer on the host per layer."""

    plans_on_host = True

    def __init__(self, pages: HeadPages, group: int, scale: float) -> None:
        require("flashinfer", "FlashInfer")
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        super().__init__(pages, group, scale)
        # Layers run one after the other and can share what holds partial results.
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=pages.device)
        self.wrappers = [
            BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=True, backend="fa2"
            )
            for _ in range(self.layers)
        ]
        self.lists = [self.page_lists(layer) for layer in range(self.layers)]
        self.last = [((lens - 1) % PAGE_TOKENS + 1).cpu() for _, _, lens in self.lists]
        self.cache = (pages.k_pages.unsqueeze(2), pages.v_pages.unsqueeze(2))

    def plan(self) -> None:
        pages = self.pages
        for wrapper, (indptr, indices, _), last in zip(
            self.wrappers, self.lists, self.last, strict=True
        ):
            wrapper.plan(
                indptr, indices, last, self.group, 1, pages.head_dim, PAGE_TOKENS,
                q_data_type=pages.dtype, kv_data_type=pages.dtype, sm_scale=self.scale,
            )  # fmt: skip

    def run(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        self.wrappers[layer].run(q, self.cache, out=out)


class PersistentFlashInfer(Contender):
    """FlashInfer's persistent `BatchAttention`, planned on the host per layer."""

    plans_on_host = True

    def __init__(self, pages: HeadPages, group: int, scale: float) -> None:
        require("flashinfer", "FlashInfer")
        from flashinfer import BatchAttention

        super().__init__(pages, group, scale)
        self.wrappers = []
        for _ in range(self.layers):
            self.wrappers.append(BatchAttention("NHD", str(pages.device)))
            # 384 MiB for partial results alone: layers run one after the other and can share them.
            self.wrappers[-1].float_workspace_buffer = self.wrappers[0].float_workspace_buffer
        self.lists = [self.page_lists(layer) for layer in range(self.layers)]
        self.queries = torch.arange(self.rows + 1, dtype=torch.int32)
        self.lse = torch.empty((self.rows, group), dtype=torch.float32, device=pages.device)
        self.cache = (pages.k_pages.unsqueeze(2), pages.v_pages.unsqueeze(2))

    def plan(self) -> None:
        pages = self.pages
        for wrapper, (indptr, indices, lens) in zip(self.wrappers, self.lists, strict=True):
            wrapper.plan(
                self.queries, indptr, indices, lens.cpu(), self.group, 1, pages.head_dim,
                pages.head_dim, PAGE_TOKENS, causal=False, sm_scale=self.scale,
                q_data_type=pages.dtype, kv_data_type=pages.dtype,
            )  # fmt: skip

    def run(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        self.wrappers[layer].run(q, self.cache, out=out, lse=self.lse)


class SGLangTriton(Contender):
    """SGLang's Triton decode kernel with its own number of splits for each row.

    It reads token slots, not pages, as SGLang does at every page size.
    """

    def __init__(self, pages: HeadPages, group: int, scale: float) -> None:
        require("sglang", "SGLang")
        try:
            from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
        except ImportError as error:
            raise NotRun(f"SGLang cannot be imported: {error}") from error

        super().__init__(pages, group, scale)
        self.decode, device = decode_attention_fwd, pages.device
        self.cache = (
            pages.k_pages.view(-1, 1, pages.head_dim), pages.v_pages.view(-1, 1, pages.head_dim)
        )  # fmt: skip
        self.lens = pages.lens[1:].t().contiguous()
        self.indptr = [_starts(lens) for lens in self.lens]
        self.slots = [self.token_slots(layer) for layer in range(self.layers)]
        shape = (self.rows, group, SGLANG_SPLITS)
        self.partial = torch.empty((*shape, pages.head_dim), dtype=torch.float32, device=device)
        self.lse = torch.empty(shape, dtype=torch.float32, device=device)
        self.splits = torch.empty((self.layers, self.rows), dtype=torch.int32, device=device)

    def token_slots(self, layer: int) -> torch.Tensor:
        """int64 [tokens of the layer]: place of each token in the arena."""
        table = self.pages.page_table[1:, layer].long() * PAGE_TOKENS
        slots = table[:, :, None] + torch.arange(PAGE_TOKENS, device=self.pages.device)
        token = torch.arange(slots.shape[1] * PAGE_TOKENS, device=self.pages.device)
        return slots.flatten(1)[token < self.lens[layer][:, None]]

    def plan(self) -> None:
        import triton
        from sglang.kernels.ops.attention.metadata import get_num_kv_splits_triton

        processors = 1
        if self.pages.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.pages.device)
            processors = properties.multi_processor_count
        for lens, splits in zip(self.lens, self.splits, strict=True):
            get_num_kv_splits_triton[(1,)](
                splits, lens, self.rows, 1, self.group, 1, SGLANG_SPLITS, processors,
                MAX_NUM_SEQ=max(256, triton.next_power_of_2(self.rows)),
            )  # fmt: skip

    def run(self, layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
        self.decode(
            q, *self.cache, out, self.indptr[layer], self.slots[layer], self.partial, self.lse,
            self.splits[layer], SGLANG_SPLITS, self.scale, 1.0, 1.0,
        )  # fmt: skip


Maker = Callable[[HeadPages, int, float], Contender]
CONTENDERS: dict[str, Maker] = {
    "ours": Ours,
    "unordered": partial(Ours, longest_first=False),
    "S=1/SM": partial(Ours, tiles=1),
    "S=4/SM": partial(Ours, tiles=4),
    "stock": StockFlashInfer,
    "BatchAttention": PersistentFlashInfer,
    "SGLang Triton": SGLangTriton,
    "our Triton": OurTriton,
}
"""By the column of the table. `ours` has two spare tiles for each multiprocessor, longest first;
`unordered` is the same in FlashInfer's order of tiles."""
VARIANTS = ("unordered", "S=1/SM", "S=4/SM")
"""Those that differ from `ours` only in the plan."""
