# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's public decode wrapper in torch: it refuses what FlashInfer would misread.

Signatures are those of FlashInfer 0.6.15 and 0.6.18. Pages and lengths are read only through what
`plan` was given, so a wrong page list or length shows in the result.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        assert (kv_layout, use_cuda_graph, use_tensor_cores) == ("NHD", False, True)
        assert backend == "fa2"
        assert float_workspace_buffer.numel() >= 128 << 20

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        assert page_size == 16 and q_data_type == kv_data_type and num_kv_heads == 1
        assert int(last_page_len.min()) >= 1 and int(last_page_len.max()) <= 16
        assert indptr.dtype == indices.dtype == torch.int32
        assert indptr.device.type == "cpu"
        assert indptr[0] == 0 and indptr[-1] == len(indices)
        self.indptr, self.indices = indptr, indices
        self.lens = (indptr.diff() - 1) * page_size + last_page_len
        assert bool((self.lens > 0).all())
        self.group, self.scale = num_qo_heads, sm_scale

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        assert q.is_contiguous() and q.shape == out.shape and q.shape[1] == self.group
        assert all(x.shape[1:] == (16, 1, q.shape[2]) for x in paged_kv_cache)
        for row, length in enumerate(self.lens.tolist()):
            ids = self.indices[self.indptr[row] : self.indptr[row + 1]].long()
            k, v = (x[ids].reshape(-1, q.shape[2])[:length].double() for x in paged_kv_cache)
            weights = (q[row].double() @ k.T * self.scale).softmax(-1)
            out[row] = (weights @ v).to(out.dtype)
        return out


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import flashinfer` find this class."""
    module: Any = types.ModuleType("flashinfer")
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    module.__version__ = "0.6.18"
    module.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)
