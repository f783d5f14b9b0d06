"""On a process' path: if it is one of these modules', it takes its libraries from :mod:`forks` instead of importing them.

The process is started by the real command. Its work is done by a fork, which has its arguments, environment, folder and output,
ends when this process ends, and gives it its status.
"""

import os
import sys
from functools import partial
from pathlib import Path

MODULES = (
    "nvflare.private.fed.app.client.worker_process",
    "nvflare.private.fed.app.server.runner_process",
    "fedgrove.evaluation.metrics.speed",
)

if "-m" in sys.orig_argv:
    module, *words = sys.orig_argv[sys.orig_argv.index("-m") + 1 :]
    if module in MODULES:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        import forks

        call = partial(forks.module, module, words, dict(os.environ), os.getcwd(), os.getpid())  # noqa: PTH109
        os._exit(forks.run(call) & 0xFF)
