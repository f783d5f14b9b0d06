"""Imported by the process that the processes of :func:`small.process` are forked from: what libraries import late, once."""

from __future__ import annotations

import contextlib
from importlib import import_module

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from small import DEMO

for name in ("peft", "fedgrove.cli", "fedgrove.run", "fedgrove.report.page"):
    import_module(name)
with contextlib.suppress(ImportError):  # of the extra fedgrove[flare]
    for name in ("controller", "executor", "launcher", "site"):
        import_module(f"fedgrove.deploy.flare.{name}")
    for name in ("client.worker_process", "server.runner_process"):
        import_module(f"nvflare.private.fed.app.{name}")

torch.set_num_threads(1)  # no thread may be lost in a fork
AutoTokenizer.from_pretrained(DEMO / "grove-6m")
with init_empty_weights(include_buffers=False):
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(DEMO / "grove-6m"))
