"""The only place where transformers reads a folder: its configuration, its tokenizer, or the full model.

Python code that lies beside a model is never run. What transformers raises for a stranger's file changes with every release, so
here all of it becomes one line that names the file.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from fedgrove.errors import FedgroveError, first_line
from fedgrove.models.depth import num_blocks
from fedgrove.models.files import (
    CONFIG,
    INDEX,
    index_of,
    loads_as_it_is,
    read_json,
    small_contents,
    small_files,
    weight_files,
)
from fedgrove.models.shared import read_shares, resolve_shares
from fedgrove.models.tensor_files import TORCH_DTYPES, header, write_safetensors

if TYPE_CHECKING:  # this import takes as long as that of torch
    from transformers import PreTrainedModel

CODE = "it needs Python code of its own, which is never run"
SHARED = "shared.safetensors"  # in a temporary folder: the tensors that are stored once
ATTENTIONS = ("sdpa", "eager")  # the first that the model has; others need packages or GPUs that may be missing
# Settings of config.json for training and for looking into a model, which change what its functions return.
_SWITCHES = {
    "gradient_checkpointing": False, "output_attentions": False, "output_hidden_states": False, "output_router_logits": False,
    "return_dict": True,
}  # fmt: skip
CHAT_TEMPLATES = "additional_chat_templates"  # the folder of a tokenizer's templates besides its first
_BIDIRECTIONAL = ("bert-generation", "xlnet")  # encoders that transformers does not list as masked language models

T = TypeVar("T")


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a model directory.

    Raises:
        FedgroveError: config.json is damaged, of a type that transformers does not know, or needs code of its own.
    """
    file = folder / CONFIG
    raw = read_json(file)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the types of what it raises are not documented
        kind = raw.get("model_type")
        if kind not in CONFIG_MAPPING and "auto_map" in raw:
            raise _needs_code(file) from error
        if kind not in CONFIG_MAPPING:
            raise FedgroveError(
                f"model: {file} is not understood: model_type {kind!r} is unknown to the installed transformers",
                "take a model that transformers knows, or a newer transformers",
            ) from error
        raise FedgroveError(f"model: {file} is not understood: {first_line(error)}", "correct it, or copy it again") from error


def _switched(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of a configuration with which a model returns its logits and nothing else."""
    config = deepcopy(config)
    for part in (config, config.get_text_config()):
        for key, value in _SWITCHES.items():
            if hasattr(part, key):
                setattr(part, key, value)
    return config


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model directory; whoever calls it must not change it.

    The latest stays in memory and is given again as long as the files' contents are the same: to read one takes a second where
    the vocabulary is large, and a run needs it in several places.

    Raises:
        FedgroveError: there is none, its files are damaged, or it needs code of its own.
    """
    try:
        files = [*small_files(folder), *sorted(folder.glob(f"{CHAT_TEMPLATES}/*"))]
        key = tuple((file.name, hashlib.sha256(file.read_bytes()).digest()) for file in files)
    except OSError:  # transformers says what is wrong
        return _read_tokenizer(folder)
    tokenizer = _latest.get(key)
    if tokenizer is None:
        tokenizer = _read_tokenizer(folder)
        _latest.clear()
        _latest[key] = tokenizer
    return tokenizer


_latest: dict[tuple[tuple[str, bytes], ...], PreTrainedTokenizerBase] = {}


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    file = folder / "tokenizer_config.json"
    raw = read_json(file) if file.is_file() else {}
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the types of what it raises are not documented
        if "auto_map" in raw:
            raise _needs_code(file) from error
        raise FedgroveError(
            f"model: {folder} has no tokenizer that loads: {first_line(error)}",
            "copy the tokenizer's files (tokenizer.json) again",
        ) from error


@contextmanager
def without_weights() -> Iterator[None]:
    """Models built here have parameters on the meta device. Their buffers are real: no checkpoint holds all of them.

    To fill parameters that have no values takes most of the time, so here it is left out, by torch and by transformers.
    """
    with init_empty_weights(include_buffers=False), no_init_weights():
        yield


def hollow_model(config: PretrainedConfig, folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """The causal decoder of a configuration, in the context in which it is called (such as without weights).

    Args:
        config: of the model.
        folder: for messages.
        dtype: of the parameters and of constants that no checkpoint holds, such as the scale of Gemma's embeddings.

    Raises:
        FedgroveError: it is no causal decoder, or its config.json cannot be built.
    """
    kind = getattr(config, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise FedgroveError(f"model: {folder}: type {kind} is an encoder-decoder", "fedgrove prunes causal decoders")
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING or kind in _BIDIRECTIONAL
    if masked and not getattr(config, "is_decoder", False):
        raise FedgroveError(f"model: {folder}: type {kind} is an encoder", "fedgrove prunes causal decoders")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if getattr(config, "auto_map", None):
            raise _needs_code(folder / CONFIG)
        raise FedgroveError(f"model: {folder}: type {kind} is no causal language model", "take one that generates text")
    switched = _switched(config)
    return _with_attention(
        lambda attention: AutoModelForCausalLM.from_config(
            switched, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        ),
        lambda error: FedgroveError(
            f"model: no {kind} can be built from {folder / CONFIG}: {first_line(error)}", "correct it, or copy it again"
        ),
    )


def load_full_model(folder: Path, **settings: Any) -> Any:
    """The full model in memory, in evaluation mode, loaded by transformers from the files that are the model.

    Args:
        folder: a model directory.
        settings: for ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        FedgroveError: transformers cannot load it.
    """
    with plain_folder(folder) as path:
        config = _switched(read_config(path))
        model = _with_attention(
            lambda attention: AutoModelForCausalLM.from_pretrained(
                path, config=config, attn_implementation=attention, trust_remote_code=False, **settings
            ),
            lambda error: FedgroveError(f"model: transformers does not load {folder}: {first_line(error)}", "copy it again"),
        )
    return cast(Any, model).eval()


def load_gguf(file: Path, complete: Callable[[PretrainedConfig], PretrainedConfig]) -> Any:
    """The full model in a GGUF file, in float32 and in evaluation mode.

    Args:
        file: the GGUF file.
        complete: gives the configuration to use, from the one that transformers makes of the file.

    Raises:
        FedgroveError: transformers cannot load it.
    """
    try:
        config = complete(AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False))
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # the types of what it raises are not documented
        raise FedgroveError(f"model: transformers does not load {file}: {first_line(error)}", "export it again") from error
    return cast(Any, model).eval()


@contextmanager
def plain_folder(folder: Path) -> Iterator[Path]:
    """A folder from which transformers loads the model: the given one, or a temporary one with links to its files.

    The latter where transformers would not find the weights, or would put an adapter on top; see
    :func:`fedgrove.models.files.loads_as_it_is`. Tensors that several parameters share, and that are stored once, are written
    there for each of them.
    """
    files = weight_files(folder)
    stored = {name: file for file in files.values() for name in header(file)}
    copies = {name: tensor for name, tensor in shares_of(folder).items() if name not in stored}
    if loads_as_it_is(folder) and not copies:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        links = Path(temporary)
        for small, content in small_contents(folder).items():
            (links / small).write_bytes(content)
        names = {}
        for number, (name, file) in enumerate(files.items()):
            name = f"shard-{number:05d}.safetensors" if copies else name  # a single file would be read without an index
            (links / name).symlink_to(file.resolve())
            names[name] = list(header(file))
        if copies:
            names[SHARED] = list(copies)
            _write_copies(links / SHARED, {name: (stored[tensor], tensor) for name, tensor in copies.items()})
        index = index_of(names, sum(file.stat().st_size for file in links.glob("*.safetensors")))
        if index is not None:
            (links / INDEX).write_text(index, encoding="utf-8")
        yield links


def shares_of(folder: Path) -> dict[str, str]:
    """The parameters that share a stored tensor, as a model directory declares them; see :mod:`fedgrove.models.shared`."""
    declared = read_shares(folder)
    headers = {name: entry for file in weight_files(folder).values() for name, entry in header(file).items()}
    return resolve_shares(declared, headers, num_blocks(read_config(folder)), folder) if declared else {}


def _write_copies(file: Path, copies: Mapping[str, tuple[Path, str]]) -> None:
    """Writes tensors of other files under new names: new name -> file, name there."""

    def read(place: tuple[Path, str]) -> Tensor:
        with safe_open(place[0], framework="pt") as opened:
            return cast(Tensor, opened.get_tensor(place[1]))

    entries = {name: header(source)[tensor] for name, (source, tensor) in copies.items()}
    specs = {name: (torch.Size(entry["shape"]), TORCH_DTYPES[entry["dtype"]]) for name, entry in entries.items()}
    write_safetensors(file, specs, map(read, copies.values()))


def _with_attention(build: Callable[[str], T], refusal: Callable[[Exception], FedgroveError]) -> T:
    """Builds with the first kind of attention that the model has; config.json may ask for one that is not installed."""
    fault: Exception | None = None
    for attention in ATTENTIONS:
        try:
            return build(attention)
        except Exception as error:  # the types of what it raises are not documented
            fault = error
    assert fault is not None
    raise refusal(fault) from fault


def _needs_code(file: Path) -> FedgroveError:
    return FedgroveError(f"model: {file}: {CODE}", "take a model that transformers knows")
