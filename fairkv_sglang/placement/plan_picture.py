# SPDX-License-Identifier: Apache-2.0
"""Pictures of plans and replays (matplotlib, no display needed)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fairkv_sglang.placement.options import FloatArray
from fairkv_sglang.placement.plan import Plan

BEFORE, AFTER = "0.6", "black"
"""Greys: the colours of a picture are its ranks and its loads."""


def draw_plan(
    plan: Plan, path: str | Path, loads: FloatArray | None = None, before: Plan | None = None
) -> None:
    """Which rank serves which head and, with expected tokens ``loads [L, H]``, what the ranks read.

    Heat maps show each rank's tokens over the mean of its layer, for ``before`` (if given) and for
    the plan; the map beside them the rank with the largest share of each (layer, head), and as a
    digit how many ranks serve a copied head; the bars the tokens of each layer's fullest rank,
    second fullest and so on, summed over layers.
    """
    from matplotlib.figure import Figure  # slow to import

    height = max(3.5, min(0.16 * plan.num_layers + 1.5, 14.0))
    rank_map = max(3.0, min(0.3 * plan.num_kv_heads + 1.5, 11.0))
    load_map = max(1.2, min(0.25 * plan.tp_size + 0.4, 4.0))
    shown = [] if loads is None else [plan] if before is None else [before, plan]
    widths = [*[load_map] * len(shown), rank_map, *[4.5] * bool(shown)]
    figure = Figure(figsize=(sum(widths) + 1.5, height), layout="constrained")
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    _rank_map(figure, axes[len(shown)], plan)
    if loads is not None:
        tokens = [np.einsum("lrh,lh->lr", item.shares(), loads) for item in shown]
        _load_maps(figure, axes[: len(shown)], shown, tokens)
        _load_bars(axes[-1], shown, tokens)
    figure.suptitle(f"{plan.model or 'model'}, {plan.policy}, TP {plan.tp_size}", fontsize=11)
    figure.savefig(path, dpi=120)


def _load_maps(figure: Any, axes: Any, plans: list[Plan], tokens: list[FloatArray]) -> None:
    relative = [part / np.maximum(part.mean(axis=1, keepdims=True), 1e-300) for part in tokens]
    top = max(float(part.max()) for part in relative)
    names = ["plan"] if len(plans) == 1 else [f"before:\n{plans[0].policy}", "after:\nthis plan"]
    for panel, part, name in zip(axes, relative, names, strict=True):
        image = panel.imshow(part, aspect="auto", cmap="YlOrRd", vmin=0.0, vmax=max(top, 2.0))
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("rank")
        panel.set_xticks(range(part.shape[1]))
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), label="tokens of a rank / its layer's mean")


def _rank_map(figure: Any, axes: Any, plan: Plan) -> None:
    from matplotlib import colormaps

    main = plan.shares().argmax(axis=1)
    colours = colormaps["tab20" if plan.tp_size > 8 else "Set2"]
    main, count = main % colours.N, colours.N
    image = axes.imshow(main, aspect="auto", cmap=colours, vmin=-0.5, vmax=count - 0.5)
    axes.set_xlabel("KV head")
    if plan.num_kv_heads <= 16:
        axes.set_xticks(range(plan.num_kv_heads))
    axes.set_ylabel("layer")
    axes.set_title("who serves what\n(digit: ranks of a copied head)", fontsize=9)
    if plan.num_layers * plan.num_kv_heads <= 4096:
        for layer, heads in enumerate(plan.copies()):
            for head, ranks in enumerate(heads):
                if len(ranks) > 1:
                    axes.text(head, layer, len(ranks), ha="center", va="center", fontsize=6)
    bar = figure.colorbar(image, ax=axes, ticks=range(plan.tp_size))
    bar.set_label("rank with the largest share")
    bar.ax.set_ylim(-0.5, plan.tp_size - 0.5)


def _load_bars(axes: Any, plans: list[Plan], tokens: list[FloatArray]) -> None:
    mean = float(tokens[0].sum() / tokens[0].shape[1])
    wide = 0.8 / len(plans)
    for index, (plan, part) in enumerate(zip(plans, tokens, strict=True)):
        ordered = np.sort(part, axis=1)[:, ::-1].sum(axis=0)
        after = plan is plans[-1]
        name = "plan" if len(plans) == 1 else "after" if after else "before"
        label = f"{name}: fullest {ordered[0] / max(mean, 1e-300):.2f} of the mean"
        at = np.arange(len(ordered)) + (index - (len(plans) - 1) / 2) * wide
        axes.bar(at, ordered, wide, color=AFTER if after else BEFORE, label=label)
    axes.axhline(mean, color="tab:blue", linewidth=1.2, linestyle="--", label="mean")
    axes.set_xlabel("ranks of each layer, fullest first")
    axes.set_ylabel("tokens per request, all layers")
    axes.set_xticks(range(tokens[0].shape[1]), [f"{i + 1}." for i in range(tokens[0].shape[1])])
    # above the axes: whatever the bars, it covers none
    axes.legend(
        title="a step waits for the 1st bar",
        title_fontsize=9,
        fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
    )


def draw_series(panels: dict[str, dict[str, FloatArray]], path: str | Path, title: str) -> None:
    """Imbalance of each step: one panel per key, one line per policy, values ``[steps]``.

    A legend below each panel gives its means over the steps.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.5 * len(panels), 6.0), 4.5), layout="constrained")
    for axes, (name, lines) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for index, (policy, values) in enumerate(lines.items()):
            style = ("-", "--", "-.", ":")[index % 4]  # equal ones show both
            axes.plot(values, style, label=f"{policy} {values.mean():.3f}", linewidth=1.3)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("decode step")
        axes.set_ylabel("fullest rank / mean rank, over layers")
        axes.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False
        )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
