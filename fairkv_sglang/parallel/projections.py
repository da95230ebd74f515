# SPDX-License-Identifier: Apache-2.0
"""What one head has in the tensors of an attention module's projections, in every weight format.

Heads lie along the output features of ``qkv_proj`` and the input features of ``o_proj``. Where they
are in a tensor depends on the format, *as SGLang's kernels read it after loading* (0.5.21,
``layers/quantization``):

* unquantised: ``weight [out, in]``;
* fp8 with a scale for the tensor or for each output: ``weight [in, out]`` (a transposed view),
  ``weight_scale [out, 1]`` or one number;
* fp8 in blocks: ``weight [out, in]`` and a scale for each block (``fp8.py``,
  ``compressed_tensors_w8a8_fp8.py``);
* AWQ and GPTQ for Marlin: ``qweight [in / 16, 16 * out / pack]`` in tiles of 16 inputs and 64
  outputs, ``scales [groups, out]`` and ``qzeros [groups, out / pack]`` permuted within 64 outputs
  (``marlin_utils.py``). Whole tiles keep their contents wherever they are put;
* fp8 for Marlin, where a GPU has no fp8 of its own: ``weight [in / 16, 4 * out]`` in such tiles,
  ``weight_scale [1 or groups, out]``.

What has no heads in it (scales of a whole tensor or of the hidden size, the bias of ``o_proj``) is
the same on all ranks.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn

OUTPUT, INPUT = 0, 1
"""The side of a linear layer that heads lie along."""
SINKS = "sinks"
"""Parameter of a module with attention sinks, ``[query heads]``."""
MARLIN_TILE = 64
_WITHOUT_HEADS = ("bias", "weight_scale", "input_scale")


def placed(linear: nn.Module, side: int) -> dict[str, int]:
    """The tensors of a linear layer that heads share out, and in which dimension.

    Raises:
        RuntimeError: for weights in a form that is not known.
    """
    held = {name: p for name, p in linear.named_parameters(recurse=False) if p.numel() > 1}
    weight, scale = held.get("weight"), held.get("weight_scale_inv", held.get("weight_scale"))
    in_blocks = hasattr(linear, "weight_scale_inv") or getattr(linear, "weight_block_size", None)
    dims: dict[str, int] = {}
    if "qweight" in held:
        dims = dict.fromkeys(("qweight", "scales", "qzeros"), 1 - side)
    elif weight is not None and weight.dtype == torch.int32:
        dims = {"weight": 1 - side}
        if in_blocks or side == OUTPUT:
            dims["weight_scale"] = 1 - side
    elif weight is not None and weight.dtype == torch.float8_e4m3fn:
        if not in_blocks:
            dims = {"weight": 1 - side} | ({"weight_scale": 0} if side == OUTPUT else {})
        elif scale is not None and scale.dtype == torch.float32:
            dims = dict.fromkeys(("weight", "weight_scale_inv", "weight_scale"), side)
    elif weight is not None and weight.is_floating_point() and weight.element_size() > 1:
        dims = {"weight": side}
    unknown = held.keys() - dims.keys() - set(_WITHOUT_HEADS)
    if not dims or unknown:
        found = ", ".join(f"{name} {p.dtype}" for name, p in held.items())
        raise RuntimeError(f"FairKV: attention weights in a form that it cannot cut: {found}")
    if side == OUTPUT:
        dims["bias"] = 0
    return {name: dim for name, dim in dims.items() if name in held}


def _is_marlin(linear: Any) -> bool:
    return hasattr(linear, "qweight") or linear.weight.dtype == torch.int32


def check(module: Any, width: int) -> None:
    """Check that heads of ``width`` query rows can be cut out of a module's projections.

    Raises:
        RuntimeError: naming the tensor whose tiles or blocks are larger than a head.
    """
    for linear, side, sizes in (
        (module.qkv_proj, OUTPUT, (width, module.head_dim)),
        (module.o_proj, INPUT, (width,)),
    ):
        features = _features(module, side)
        for name, dim in placed(linear, side).items():
            length = getattr(linear, name).shape[dim]
            tile = MARLIN_TILE if _is_marlin(linear) and side == OUTPUT else 1
            # With a single group Marlin reads scales in another order.
            groups = _is_marlin(linear) and side == INPUT and name in ("scales", "weight_scale")
            least = 2 if groups else 1
            for size in sizes:
                if size * length % features or size * length // features < least or size % tile:
                    raise RuntimeError(
                        f"FairKV: {size} features of a head cannot be cut out of {name} "
                        f"{tuple(getattr(linear, name).shape)} for {features}: its blocks are "
                        "too large"
                    )


def views(module: Any, column: int, first: int, width: int) -> list[Tensor]:
    """What one head has in a module: of q, k, v and o; biases, scales and sinks, if there are any.

    Args:
        column: The head's place among the module's KV heads.
        first: First of its query rows.
        width: Number of its query rows.
    """
    dim, q_size, kv_size = module.head_dim, module.q_size, module.kv_size
    q = (first, width)
    spans = (q, (q_size + column * dim, dim), (q_size + kv_size + column * dim, dim))
    found = _spans(module.qkv_proj, OUTPUT, _features(module, OUTPUT), spans)
    if hasattr(module, SINKS):
        found.append(getattr(module, SINKS).data.narrow(0, first // dim, width // dim))
    return found + _spans(module.o_proj, INPUT, q_size, (q,))


def _features(module: Any, side: int) -> int:
    return int(module.q_size + (2 * module.kv_size if side == OUTPUT else 0))


def _spans(linear: Any, side: int, features: int, spans: Sequence[tuple[int, int]]) -> list[Tensor]:
    found = []
    for name, dim in placed(linear, side).items():
        tensor = getattr(linear, name).data
        per = Fraction(tensor.shape[dim], features)
        found += [tensor.narrow(dim, int(start * per), int(size * per)) for start, size in spans]
    return found


def num_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def to_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """All of them, one after the other, as ``uint8``: wide types first, to keep them aligned."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.element_size())
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in ordered])


def from_bytes(data: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy what :func:`to_bytes` made into tensors of the same sizes and types."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.element_size())
    sizes = [num_bytes([tensor]) for tensor in ordered]
    for tensor, piece in zip(ordered, data.split(sizes), strict=True):
        tensor.copy_(piece.view(tensor.dtype).view(tensor.shape))


def with_heads(module: Any, count: int, group_size: int, memory: Any = None) -> nn.Module:
    """A module like ``module`` with ``count`` KV heads and projections of its own.

    It is a copy that shares everything else with the module: what a class computes from the model's
    counts when it is constructed stays right, however many heads the copy has.

    Args:
        module: SGLang's attention module.
        count: KV heads of the copy.
        group_size: Query heads of each.
        memory: A copy with more heads in whose memory this one's tensors lie; None: memory of its
            own, zeroed, as unused memory could hold NaN, which would reach others through products
            with zero.
    """
    made: Any = shallow(module)
    dim = module.head_dim
    made.num_heads, made.num_kv_heads = count * group_size, count
    made.q_size, made.kv_size = count * group_size * dim, count * dim
    made.attn = shallow(module.attn)
    made.attn.tp_q_head_num = count * group_size
    made.attn.tp_k_head_num = made.attn.tp_v_head_num = count
    for name, side in (("qkv_proj", OUTPUT), ("o_proj", INPUT)):
        own = None if memory is None else getattr(memory, name)
        old, new = _features(module, side), _features(made, side)
        setattr(made, name, _resized(getattr(module, name), side, old, new, own))
    if hasattr(module, SINKS):
        given = None if memory is None else getattr(memory, SINKS).data
        data = _like(getattr(module, SINKS).data, 0, module.num_heads, made.num_heads, given)
        made._parameters[SINKS] = nn.Parameter(data, requires_grad=False)
    return cast(nn.Module, made)


def copy_shared(module: Any, made: Any) -> None:
    """What has no heads in it goes from ``module`` to the copy that :func:`with_heads` made."""
    for name, side in (("qkv_proj", OUTPUT), ("o_proj", INPUT)):
        source, target = getattr(module, name), getattr(made, name)
        dims = placed(source, side)
        for key, parameter in source.named_parameters(recurse=False):
            if key not in dims:
                getattr(target, key).data.copy_(parameter.data)


def shallow(module: nn.Module) -> Any:
    """A module of the same class over the same attributes; those that it is given are its own."""
    made: Any = type(module).__new__(type(module))
    made.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        made.__dict__[name] = dict(module.__dict__[name])
    return made


def _resized(linear: Any, side: int, old: int, new: int, memory: Any) -> nn.Module:
    """A copy of a linear layer with ``new`` features instead of ``old`` on one side."""
    made = shallow(linear)
    dims = placed(linear, side)
    for name, parameter in linear.named_parameters(recurse=False):
        given = None if memory is None else getattr(memory, name).data
        if name in dims:
            data = _like(parameter.data, dims[name], old, new, given)
        else:  # its own as well: an update of weights may put another tensor in the home's place
            data = parameter.data.clone() if given is None else given
        made._parameters[name] = nn.Parameter(data, requires_grad=False)
    sizes = ("output_size_per_partition", "input_size_per_partition")
    if hasattr(made, sizes[side]):
        setattr(made, sizes[side], new)
    # GPTQ's kernel remembers the sizes itself.
    kernel: Any = getattr(getattr(made, "scheme", None), "kernel", None)
    config = getattr(kernel, "kernel_config", None)
    if config is not None:
        shape = list(config.partition_weight_shape)  # [in, out]
        shape[1 - side] = new
        made.scheme, kernel = copy.copy(made.scheme), copy.copy(kernel)
        made.scheme.kernel = kernel
        kernel.kernel_config = dataclasses.replace(config, partition_weight_shape=tuple(shape))
    return made


def _like(tensor: Tensor, dim: int, old: int, new: int, memory: Tensor | None) -> Tensor:
    """A tensor with the type and order of strides of another, longer or shorter in ``dim``."""
    order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride()[axis])
    shape = list(tensor.shape)
    shape[dim] = shape[dim] * new // old
    stored = [shape[axis] for axis in order]
    if memory is None:
        data = torch.zeros(stored, dtype=tensor.dtype, device=tensor.device)
    else:
        size = torch.Size(stored).numel()
        data = memory.permute(order).reshape(-1)[:size].view(stored)
    return data.permute([order.index(axis) for axis in range(tensor.dim())])
