"""A federation between organisations, on NVIDIA FLARE: kits, the site's own file, starting, submitting, watching.

``files``: the files that people write. ``kits``: certificates and folders to hand out. ``node``: starts and stops a kit.
``site``: what a site allows and answers. ``operator``: what is sent to a running federation. ``doctor``: what is wrong.
The engine itself is :mod:`fedgrove.engines.flare`.
"""

from __future__ import annotations

import importlib.util

from fedgrove.errors import FedgroveError


def require_flare() -> None:
    """Raises a clear line where the extra is not installed."""
    if importlib.util.find_spec("nvflare") is None:
        raise FedgroveError("NVIDIA FLARE is not installed; install the extra: pip install 'fedgrove[flare]'")
