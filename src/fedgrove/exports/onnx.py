"""An ONNX graph for onnxruntime and others, in float32. Needs the extra ``onnx``.

The graph takes token ids and returns the logits of every position. It has no key-value cache: it is meant for scoring,
and for programs with their own generation loop. It is written by torch's exporter; optimum's exporter, which would
write a cache, requires an older version of transformers than fedgrove (optimum-onnx 0.1.0: below 4.58, optimum-intel
2.2.0: below 5.6).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fedgrove.errors import FedgroveError
from fedgrove.exports import Source, refuse_experts, require
from fedgrove.models.files import small_contents
from fedgrove.models.perplexity import nll_of_logits
from fedgrove.models.pretrained import load_full_model
from fedgrove.models.stream import Checkpoint

WHAT = "ONNX graph in float32, without a cache"
EXACT = True
USE = """```python
import onnxruntime
from transformers import AutoTokenizer

ids = AutoTokenizer.from_pretrained("FOLDER")("The", return_tensors="np")["input_ids"]
logits = onnxruntime.InferenceSession("FOLDER/model.onnx").run(None, {"input_ids": ids})[0]  # (batch, tokens, vocabulary)
```"""
FILE = "model.onnx"


class _Logits(nn.Module):
    """A model as a function of token ids only."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def write(source: Source, out: Path) -> None:
    """Writes ``model.onnx`` and the tokenizer; the model must fit into memory twice, in float32.

    Raises:
        FedgroveError: onnx, onnxscript or onnxruntime is missing, the model is a mixture of experts, its positions change with
            the length of the text, or torch's exporter cannot write it.
    """
    require("onnx", "onnx", "onnx", "onnxscript", "onnxruntime")
    refuse_experts("onnx", source)
    checkpoint = Checkpoint(source.model)
    if _grows(checkpoint.config):
        raise FedgroveError(
            "--to onnx: positions of type 'dynamic' change with the length of the text, and a graph's cannot", "export --to hf"
        )
    model = load_full_model(source.model, dtype=torch.float32)
    max_tokens = getattr(checkpoint.config, "max_position_embeddings", None)
    dynamic = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=max_tokens)}
    example = torch.ones(2, min(16, max_tokens or 16), dtype=torch.int64)
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about operators of packages that are not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Logits(model).eval(),
                (example,),
                dynamo=True,
                verbose=False,
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_shapes={"input_ids": dynamic},
            )
    except Exception as error:  # what the exporter raises differs from release to release
        kind = checkpoint.config.model_type
        raise FedgroveError(
            f"--to onnx: torch's exporter cannot write this {kind} model ({type(error).__name__})",
            "use another form, such as hf",
        ) from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    assert program is not None
    program.save(out / FILE)
    for name, content in small_contents(source.model).items():
        (out / name).write_bytes(content)


def _grows(config: PretrainedConfig) -> bool:
    """Whether the frequencies of rotary positions depend on the length of the text, in any kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return any(one.get("rope_type") == "dynamic" for one in (rope, *rope.values()) if isinstance(one, dict))


def losses(source: Source, folder: Path, windows: Sequence[Tensor]) -> tuple[float, int]:
    """Computed by onnxruntime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])
    return nll_of_logits(lambda ids: torch.from_numpy(session.run(None, {"input_ids": ids.long().numpy()})[0]), windows)
