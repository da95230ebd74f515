# SPDX-License-Identifier: Apache-2.0
"""What a prefill and a decode server must have been given alike, compared at their first contact.

Placement, plan and memory are each server's own: what a prompt keeps does not depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fairkv_sglang.nodes import file_digest
from fairkv_sglang.planning import Start, budget_text
from fairkv_sglang.version import __version__

if TYPE_CHECKING:
    import torch


def to_agree(start: Start, dtype: torch.dtype) -> dict[str, str]:
    """What decides which rows come and what they look like, as texts.

    Args:
        start: This server's configuration and model.
        dtype: Of K and V.
    """
    config, model = start.config, start.model
    shape = f"{model.num_layers} layers, {model.num_kv_heads} KV heads of {model.head_dim}"
    said = {
        "version": __version__,
        "model": f"{shape}, {dtype}",
        "scorer": config.scorer,
        "scope": config.scope,
        "budget": budget_text(config),
        "protect_system": str(config.protect_system),
        "options": str({**config.options("scorer"), **config.options("scope")}),
    }
    if start.scope.profile is not None and start.scope.needs_profile:
        said["profile"] = file_digest(config.profile)
    return said


def difference(prefill: Mapping[str, str], decode: Mapping[str, str], address: str) -> str | None:
    """One line on what the decode server was given otherwise; None if nothing.

    Args:
        prefill: :func:`to_agree` of the prefill server.
        decode: Of the decode server.
        address: Of the prefill server.
    """
    names = [name for name in {**prefill, **decode} if prefill.get(name) != decode.get(name)]
    if not names:
        return None
    told = ", ".join(f"{n} {decode.get(n)!r} instead of {prefill.get(n)!r}" for n in names)
    return (
        f"FairKV was started otherwise on this decode server than on the prefill server {address}: "
        f"{told}; give both the same model, budget, scorer and scope"
    )
