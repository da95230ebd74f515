# SPDX-License-Identifier: Apache-2.0
"""Flags of the load model, shared by the placement sub-commands."""

from __future__ import annotations

import argparse
from typing import Any

from fairkv_sglang.placement.cost import CostModel
from fairkv_sglang.placement.model import ModelShape
from fairkv_sglang.placement.options import PlanOptions, checked


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Model sizes and expected traffic; every default is printed with the result."""
    group = parser.add_argument_group("model and traffic")
    group.add_argument(
        "--model-config", "--model-path", metavar="PATH", help="config.json, or its folder"
    )
    group.add_argument("--head-dim", type=int, help="default 128")
    group.add_argument("--hidden-size", type=int, help="default KV heads x group x head dim")
    group.add_argument("--group", type=int, help="query heads per KV head; default 4")
    group.add_argument("--weight-bytes", type=float, help="per parameter; default 2 (16 bit)")
    group.add_argument("--kv-bytes", type=float, default=2.0, help="per element; default 2")
    group.add_argument("--batch", type=float, default=32.0, help="requests at a time; default 32")
    group.add_argument(
        "--budget", type=float, default=1024.0, help="mean kept tokens per head; default 1024"
    )
    group.add_argument("--weight-byte-cost", type=float, default=1.0, help="measured; default 1")
    group.add_argument("--kv-byte-cost", type=float, default=1.0, help="measured; default 1")
    group.add_argument("--row-cost", type=float, default=0.0, help="per request and head")
    group.add_argument(
        "--ops-per-byte",
        type=float,
        default=0.0,
        help="operations in the time of reading a byte; default 0: computing never counts",
    )
    group.add_argument(
        "--activation-passes", type=float, default=0.0, help="over a lane's activations; default 0"
    )
    group.add_argument(
        "--free-copies", "--copies-are-free", action="store_true", help="copies cost nothing"
    )


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """Fields of PlanOptions."""
    group = parser.add_argument_group("limits and targets")
    group.add_argument("--tolerance", type=float, help="balance with free copies; default 1.02")
    group.add_argument("--max-copies-per-layer", type=int)
    group.add_argument("--max-copies-per-rank", type=int, help="over all layers")
    group.add_argument("--max-extra-bytes", type=float, help="weights of all copies")
    group.add_argument("--spread", type=float, help="variation of a head's load between batches")
    group.add_argument("--spare-tolerance", type=float, help="balance under it; default 1.01")
    group.add_argument("--time-limit", type=float, help="exact: seconds per layer; default 5")


def model_shape(args: argparse.Namespace, layers: int, heads: int) -> ModelShape:
    """Sizes from the config, then flags, then defaults. ValueError where the profile differs."""
    known = ModelShape.from_config(args.model_config) if args.model_config else None
    if known is not None and (known.num_layers, known.num_kv_heads) != (layers, heads):
        raise ValueError(
            f"the profile has {layers} layers x {heads} KV heads, the model config "
            f"{known.num_layers} x {known.num_kv_heads}"
        )
    group = args.group or (known.group if known else 4)
    head_dim = args.head_dim or (known.head_dim if known else 128)
    hidden = args.hidden_size or (known.hidden_size if known else heads * group * head_dim)
    width = args.weight_bytes
    if width is None:
        width = known.weight_bytes if known else 2.0
    return ModelShape(layers, heads, group, head_dim, hidden, width, known.name if known else None)


def cost_model(args: argparse.Namespace, shape: ModelShape) -> CostModel:
    """The load model; with ``--free-copies`` weights cost nothing."""
    return checked(
        CostModel,
        head_dim=shape.head_dim,
        hidden_size=shape.hidden_size,
        group=shape.group,
        weight_bytes=shape.weight_bytes,
        kv_bytes=args.kv_bytes,
        batch=args.batch,
        weight_byte_cost=0.0 if args.free_copies else args.weight_byte_cost,
        kv_byte_cost=args.kv_byte_cost,
        row_cost=args.row_cost,
        ops_per_byte=args.ops_per_byte,
        activation_passes=0.0 if args.free_copies else args.activation_passes,
    )


def plan_options(args: argparse.Namespace) -> PlanOptions:
    """PlanOptions of the flags that were given."""
    names = PlanOptions.model_fields
    given: dict[str, Any] = {
        name: getattr(args, name) for name in names if getattr(args, name, None) is not None
    }
    return checked(PlanOptions, **given)
