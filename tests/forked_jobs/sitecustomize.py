"""On a process' path: if it is one of these modules', or multiprocessing's, it takes its libraries from :mod:`forks`.

Otherwise it would import them, which takes four seconds.

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

SPAWNED = "from multiprocessing.spawn import spawn_main; spawn_main("  # how multiprocessing starts a process

module, *words = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else ("",)
code = next((part for part in sys.orig_argv if part.startswith(SPAWNED)), "")
if module in MODULES or code:
    given = [int(number) for number in os.listdir("/proc/self/fd") if int(number) > 2]  # noqa: PTH208
    given = [number for number in given if Path(f"/proc/self/fd/{number}").exists()]  # but for that of the listing itself
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import forks

    here = (dict(os.environ), os.getcwd(), os.getpid())  # noqa: PTH109
    if not code:
        os._exit(forks.run(partial(forks.module, module, words, *here)) & 0xFF)
    os._exit(forks.run(partial(forks.spawned, code, *here), given=given) & 0xFF)
