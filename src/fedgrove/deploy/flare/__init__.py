"""A federation between organisations, on NVIDIA FLARE: kits, the site's own file, starting, submitting, watching.

``files``: the files that people write. ``kits``: certificates and folders to hand out. ``node``: starts and stops a kit.
``operator``: submits jobs to a running federation, watches them and fetches results. ``doctor``: checks a kit.

``launcher`` starts the process of a run, at the server and at a site; ``outcomes`` notes which of a run's processes have ended.

A run at the server: ``controller`` (FLARE's end) and ``coordinate``. At a site: ``executor`` (FLARE's end), ``site`` (bytes in,
bytes out), ``policy`` (what the site allows), ``installation`` (what it has), ``exchanges`` (requests to the
site itself).
The engine is :mod:`fedgrove.engines.flare`.
"""

from __future__ import annotations

import importlib.resources
import importlib.util

from fedgrove.errors import FedgroveError

TEMPLATES = importlib.resources.files("fedgrove") / "deploy" / "flare" / "texts"  # of the files in a kit


def require_flare() -> None:
    """Raises :class:`FedgroveError` if the extra ``flare`` is not installed."""
    if importlib.util.find_spec("nvflare") is None:
        raise FedgroveError("NVIDIA FLARE is not installed", "install the extra: pip install 'fedgrove[flare]'")
