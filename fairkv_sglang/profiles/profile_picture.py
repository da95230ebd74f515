# SPDX-License-Identifier: Apache-2.0
"""A heat map of a head profile."""

from __future__ import annotations

from pathlib import Path

from fairkv_sglang.profiles.head_profile import HeadProfile


def draw(profile: HeadProfile, path: str | Path) -> None:
    """Writes a picture (suffix picks the type, e.g. .png): share of each head, 1.0 = the mean."""
    from matplotlib.figure import Figure  # slow to import, and not needed by a server

    height = max(2.8, min(0.18 * profile.num_layers + 1.2, 12.0))
    width = max(4.5, min(0.3 * profile.num_kv_heads + 2.2, 12.0))
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(profile.relative, aspect="auto", cmap="viridis", vmin=0.0)
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    meta = profile.meta
    made = meta["scorer"] if "scorer" in meta else meta.get("source", "")
    about = ", ".join(str(part) for part in (profile.model, made) if part)
    axes.set_title("What each head keeps" + f"\n{about}" * bool(about), fontsize=9)
    figure.colorbar(image, label="over the mean of all heads")
    figure.savefig(path, dpi=150)
