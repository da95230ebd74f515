# SPDX-License-Identifier: Apache-2.0
"""Pictures of plans and replays (matplotlib, no display needed)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.placement.plan import Plan


def draw_plan(
    plan: Plan, path: str | Path, loads: FloatArray | None = None, before: Plan | None = None
) -> None:
    """Placement heat map and, with expected tokens ``loads [L, H]``, loads of the ranks.

    The map shows the rank with the largest share of each (layer, head) as colour and the number
    of ranks that serve a copied head as a digit. The bars show the summed tokens of each layer's
    fullest rank, second fullest and so on, for ``before`` (if given) and for the plan.
    """
    from matplotlib.figure import Figure  # slow to import

    columns = 1 if loads is None else 2
    height = max(3.5, min(0.16 * plan.num_layers + 1.5, 14.0))
    width = max(4.5, min(0.35 * plan.num_kv_heads + 2.0, 12.0))
    figure = Figure(figsize=(width + (6.0 if columns == 2 else 0.0), height), layout="constrained")
    ratios = [width, 6.0][:columns]
    axes = figure.subplots(1, columns, squeeze=False, width_ratios=ratios)[0]
    _placement(figure, axes[0], plan)
    if loads is not None:
        _rank_loads(axes[1], plan, loads, before)
    figure.suptitle(f"{plan.model or 'model'}: {plan.policy}, TP {plan.tp_size}", fontsize=10)
    figure.savefig(path, dpi=120)


def _placement(figure: Any, axes: Any, plan: Plan) -> None:
    from matplotlib import colormaps

    main = plan.shares().argmax(axis=1)
    colours = colormaps["tab20" if plan.tp_size > 10 else "tab10"]
    count = max(20 if plan.tp_size > 10 else 10, plan.tp_size)
    image = axes.imshow(main % count, aspect="auto", cmap=colours, vmin=-0.5, vmax=count - 0.5)
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.set_title("rank with the largest share; digit: ranks of a copied head", fontsize=8)
    if plan.num_layers * plan.num_kv_heads <= 4096:
        for layer, heads in enumerate(plan.copies()):
            for head, ranks in enumerate(heads):
                if len(ranks) > 1:
                    axes.text(head, layer, len(ranks), ha="center", va="center", fontsize=6)
    bar = figure.colorbar(image, ax=axes, ticks=range(plan.tp_size), boundaries=None)
    bar.ax.set_ylim(-0.5, plan.tp_size - 0.5)


def _rank_loads(axes: Any, plan: Plan, loads: FloatArray, before: Plan | None) -> None:
    shown = [] if before is None else [(before, "before", "tab:red", -0.2)]
    shown.append((plan, "after", "tab:blue", 0.2 if shown else 0.0))
    mean = float(loads.sum() / plan.tp_size)
    wide = 0.4 if before is not None else 0.8
    for item, name, colour, shift in shown:
        tokens = np.einsum("lrh,lh->lr", item.shares(), loads)
        ordered = np.sort(tokens, axis=1)[:, ::-1].sum(axis=0)
        label = f"{name} ({item.policy}): {ordered[0] / mean:.3f} of the mean"
        axes.bar(np.arange(plan.tp_size) + shift, ordered, wide, color=colour, label=label)
    axes.axhline(mean, color="black", linewidth=0.8, linestyle="--", label="mean")
    axes.set_xlabel("ranks of each layer, fullest first")
    axes.set_ylabel("expected tokens per request, summed over layers")
    axes.set_xticks(range(plan.tp_size), [f"{i + 1}." for i in range(plan.tp_size)])
    axes.set_title("loads: the step waits for the first bar", fontsize=8)
    axes.legend(fontsize=7)


def draw_series(panels: dict[str, dict[str, FloatArray]], path: str | Path, title: str) -> None:
    """Imbalance of each step: one panel per key, one line per policy, values ``[steps]``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.5 * len(panels), 6.0), 4.0), layout="constrained")
    for axes, (name, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for policy, values in lines.items():
            axes.plot(values, label=f"{policy} {values.mean():.3f}", linewidth=1.0)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("decode step")
        axes.set_ylabel("fullest rank / mean rank, over layers")
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
