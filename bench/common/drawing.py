"""Writing of pictures of measurements, and their widths."""

from __future__ import annotations

import io

from matplotlib import rc_context
from matplotlib.figure import Figure

from kl_kernels.lab.study.figures import WIDTH

__all__ = ["WIDTH", "svg"]


def svg(figure: Figure) -> bytes:
    """The same bytes for the same figure."""
    with rc_context({"svg.hashsalt": "kl_kernels", "svg.fonttype": "path"}):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
