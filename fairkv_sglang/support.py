# SPDX-License-Identifier: Apache-2.0
"""Checks of a start, in the parent process, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fairkv_sglang.budgets import SCORERS
from fairkv_sglang.config import ConfigError, FairKVConfig
from fairkv_sglang.decode_backends import choose
from fairkv_sglang.model import Model
from fairkv_sglang.planning import Start, make_start
from fairkv_sglang.refusals import REFUSALS, Refusal


def refuse(arguments: Any, model: Model | None = None) -> None:
    """Stop at the first combination that FairKV cannot serve.

    Args:
        arguments: SGLang's server arguments, as given or resolved.
        model: Facts of the model; rows about the model are skipped without.

    Raises:
        ConfigError: with the row's message.
    """
    for row in REFUSALS:
        if row.applies(arguments, model):
            raise ConfigError(row.message)


def check_disaggregated(config: FairKVConfig, model: Model) -> None:
    """Refuse what nobody has tried with prefill and decode on servers of their own.

    Raises:
        ConfigError: in one line.
    """
    for given, what in (
        (
            SCORERS[config.scorer].repeats or SCORERS[config.scorer].reads_hidden,
            f"scorer {config.scorer}: choose another one",
        ),
        (
            config.decode_compression,
            "compression of outputs: leave --fairkv-decode-compression out",
        ),
        (model.sliding is not None, "a model with sliding windows: use one server for both"),
    ):
        if given:
            raise ConfigError(f"FairKV does not support --disaggregation-mode with {what}")


def check_split(model: Model, tp_size: int) -> None:
    """Check that SGLang can split the model over ``tp_size`` ranks.

    It deals out equal numbers of heads, or copies each KV head to the same number of ranks.

    Raises:
        ConfigError: naming the count that does not divide and the sizes that do.
    """

    def splits(ranks: int) -> bool:
        return model.num_q_heads % ranks == model.intermediate_size % ranks == 0 and (
            model.num_kv_heads % ranks == 0 or ranks % model.num_kv_heads == 0
        )

    if tp_size >= 1 and splits(tp_size):
        return
    right = " or ".join(str(n) for n in range(1, model.num_q_heads + 1) if splits(n))
    if tp_size < 1:
        raise ConfigError(f"--tp-size {tp_size} must be at least 1; use {right}")
    mlp = f" and an MLP of {model.intermediate_size}" if model.intermediate_size else ""
    raise ConfigError(
        f"--tp-size {tp_size}: {model.num_q_heads} query heads, {model.num_kv_heads} KV heads{mlp} "
        f"cannot be split over {tp_size} ranks; use {right}"
    )


def check_start(config: FairKVConfig, model: Model, tp_size: int, device: str) -> Start:
    """:func:`make_start`, which finds out what does not fit the model.

    Raises:
        ConfigError: for a profile or plan that is broken or of another model or TP size, and for
            budgets and placements that this model cannot have.
    """
    try:
        choose(config.decode_backend, device, model.sinks)
        return make_start(config, model, tp_size, device)
    except ValueError as error:
        raise ConfigError(" ".join(str(error).split())) from None


def table(rows: Iterable[Refusal] = REFUSALS) -> str:
    """The refusals as a Markdown table, for docs/support.md."""
    lines = ["| Refused with FairKV | Setting | Instead |", "|---|---|---|"]
    lines += [f"| {row.feature} | {row.setting} | {row.instead} |" for row in rows]
    return "\n".join(lines)
