"""A federation between organisations, on NVIDIA FLARE: kits, the site's own file, starting, submitting, watching.

``files``: the files that people write. ``kits``: certificates and folders to hand out. ``node``: starts and stops a kit.
``operator``: what is sent to a running federation. ``doctor``: what is wrong with a kit.

A run at the server: ``controller`` (FLARE's end) and ``coordinate``. At a site: ``executor`` (FLARE's end), ``site`` (bytes in,
bytes out), ``policy`` (what the site allows), ``installation`` (what it has), ``exchanges`` (what a site itself is asked).
The engine is :mod:`fedgrove.engines.flare`.
"""

from __future__ import annotations

import importlib.resources
import importlib.util

from fedgrove.errors import FedgroveError

TEMPLATES = importlib.resources.files("fedgrove") / "deploy" / "flare" / "texts"  # of what a kit holds


def require_flare() -> None:
    """Raises a clear line where the extra is not installed."""
    if importlib.util.find_spec("nvflare") is None:
        raise FedgroveError("NVIDIA FLARE is not installed", "install the extra: pip install 'fedgrove[flare]'")
