"""The host's memory over time: ours, and the real guest's where it is known."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from common.errors import UsageError
from common.output import write_bytes

__all__ = ["draw"]

_MIB = float(1 << 20)
_COLUMNS = 3


def draw(replays: Sequence[tuple[str, dict[str, Any]]], path: str, *, force: bool) -> None:
    """Write a picture of some answers, a panel each.

    Raises:
        UsageError: the name ends in neither .png nor .svg.
    """
    kind = os.path.splitext(path)[1].lstrip(".").lower()
    if kind not in {"png", "svg"}:
        raise UsageError(f"--plot: {path!r}; allowed is a name that ends in .png or .svg")
    columns = min(_COLUMNS, len(replays))
    rows = -(-len(replays) // columns)
    figure = Figure(figsize=(4.2 * columns + 1.0, 2.8 * rows + 0.6), layout="constrained")
    panels = np.atleast_1d(np.asarray(figure.subplots(rows, columns), object)).ravel()
    for panel, (title, found) in zip(panels, replays, strict=False):
        ours = np.array(found["resident"], np.float64).reshape(-1, 2)
        real = np.array(found.get("against", {}).get("real_resident", []), np.float64).reshape(-1, 2)
        if real.size:
            panel.plot(real[:, 0], real[:, 1] / _MIB, color="0.6", linewidth=4.0, label="real guest")
        panel.plot(ours[:, 0], ours[:, 1] / _MIB, color="tab:blue", linewidth=1.2, label="ours")
        for one in found["passes"]:
            panel.axvline(one["t_s"], color="tab:red", linewidth=0.6, alpha=0.5)
        panel.set_title(os.path.basename(title), fontsize=9)
        panel.set_xlabel("s, the recording's clock", fontsize=8)
        panel.set_ylabel("MiB the host holds", fontsize=8)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=8)
        panel.legend(fontsize=8, frameon=False)
    for panel in panels[len(replays) :]:
        panel.set_visible(False)
    target = io.BytesIO()
    figure.savefig(target, format=kind, dpi=110)
    write_bytes(target.getvalue(), path, force=force)
