"""Imported by the process that the processes of :func:`small.process` are forked from: what libraries import late, once."""

from __future__ import annotations

import contextlib

import peft  # noqa: F401
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import fedgrove.cli
import fedgrove.report.page
import fedgrove.run  # noqa: F401
from small import DEMO

with contextlib.suppress(ImportError):
    import nvflare.private.fed.app.client.worker_process
    import nvflare.private.fed.app.server.runner_process

    import fedgrove.deploy.flare.controller
    import fedgrove.deploy.flare.executor
    import fedgrove.deploy.flare.launcher
    import fedgrove.deploy.flare.site  # noqa: F401

torch.set_num_threads(1)  # no thread may be lost in a fork
AutoTokenizer.from_pretrained(DEMO / "grove-6m")
with init_empty_weights(include_buffers=False):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DEMO / "grove-6m"))
