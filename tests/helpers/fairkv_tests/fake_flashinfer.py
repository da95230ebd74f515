# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's two public wrappers in torch: they refuse what FlashInfer would misread.

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


class _Wrapper:
    """Attention of rows of one query token, each with a page list and a length."""

    def remember(
        self, indptr: Tensor, indices: Tensor, lens: Tensor, heads: tuple[int, int], scale: float
    ) -> None:
        assert indptr.dtype == indices.dtype == torch.int32
        assert indptr.device.type == "cpu"
        assert indptr[0] == 0 and indptr[-1] == len(indices)
        assert len(lens) == len(indptr) - 1
        assert bool((lens > 0).all())
        assert (-(-lens // 16)).tolist() == indptr.diff().tolist()
        assert heads[1] == 1
        self.indptr, self.indices, self.lens = indptr, indices, lens
        self.group, self.scale = heads[0], scale

    def compute(self, q: Tensor, cache: tuple[Tensor, Tensor], out: Tensor) -> None:
        assert q.is_contiguous() and q.shape == out.shape and q.shape[1] == self.group
        assert all(x.shape[1:] == (16, 1, q.shape[2]) for x in cache)
        for row, length in enumerate(self.lens.tolist()):
            ids = self.indices[self.indptr[row] : self.indptr[row + 1]].long()
            k, v = (x[ids].reshape(-1, q.shape[2])[:length].double() for x in cache)
            weights = (q[row].double() @ k.T * self.scale).softmax(-1)
            out[row] = (weights @ v).to(out.dtype)


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
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
        assert page_size == 16 and q_data_type == kv_data_type
        assert int(last_page_len.min()) >= 1 and int(last_page_len.max()) <= 16
        lens = (indptr.diff() - 1) * page_size + last_page_len
        self.remember(indptr, indices, lens, (num_qo_heads, num_kv_heads), sm_scale)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        self.compute(q, paged_kv_cache, out)
        return out


class BatchAttention(_Wrapper):
    def __init__(self, kv_layout: str = "NHD", device: str = "cuda") -> None:
        assert kv_layout == "NHD" and torch.device(device)
        self.float_workspace_buffer = torch.empty(1)

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        *,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert not causal and sm_scale is not None and page_size == 16
        assert head_dim_qk == head_dim_vo and q_data_type == kv_data_type
        assert qo_indptr.dtype == kv_len_arr.dtype == torch.int32
        assert qo_indptr.tolist() == list(range(len(kv_len_arr) + 1))
        heads = (num_qo_heads, num_kv_heads)
        self.remember(kv_indptr, kv_indices, kv_len_arr.cpu(), heads, sm_scale)

    def run(
        self, q: Tensor, kv_cache: tuple[Tensor, Tensor], out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        assert lse.shape == q.shape[:2] and lse.dtype == torch.float32
        self.compute(q, kv_cache, out)
        return out, lse


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import flashinfer` find these classes."""
    module: Any = types.ModuleType("flashinfer")
    module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
    module.__version__ = "0.6.18"
    module.BatchAttention = BatchAttention
    module.BatchDecodeWithPagedKVCacheWrapper = BatchDecodeWithPagedKVCacheWrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)
