"""Rotary positions: what a GGUF file says of them, and the frequencies that llama.cpp computes from it.

A channel pair of a head is rotated by (position × frequency), and the result is multiplied by the attention factor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder

DIVISORS = "rope_freqs.weight"  # the name of the tensor of Positions.divisors
WITH_DIVISORS = ("llama",)  # the architectures of ours for which llama.cpp reads this tensor
CLOSE = 1e-3  # how far apart, relatively, two frequencies may be: llama.cpp and transformers compute them in float32
ELSEWHERE = "export --to hf, and convert that with llama.cpp's convert_hf_to_gguf.py"


@dataclass(frozen=True)
class Positions:
    """What a GGUF file says of rotary positions.

    Attributes:
        dimensions: channels of a head that are rotated.
        base: the base of the frequencies, theta.
        scaling: "none", "linear" or "yarn".
        factor: by which linear scaling and YaRN divide frequencies.
        original_context: the context before YaRN.
        beta_fast, beta_slow: turns in that context between which YaRN interpolates.
        attention: multiplies YaRN's own attention factor.
        divisors: (dimensions / 2,) float32, divides the frequencies; None: ones.
    """

    dimensions: int
    base: float
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention: float = 1.0
    divisors: NDArray[np.float32] | None = None

    def frequencies(self) -> tuple[NDArray[np.float64], float]:
        """What llama.cpp computes: radians per position, (dimensions / 2,) float64, and the attention factor."""
        frequencies = self.base ** (-np.arange(0, self.dimensions, 2, dtype=np.float64) / self.dimensions)
        if self.divisors is not None:
            frequencies = frequencies / self.divisors
        if self.scaling == "none":
            return frequencies, 1.0
        if self.scaling == "linear":
            return frequencies / self.factor, self.attention
        first, last = math.floor(self._channel(self.beta_fast)), math.ceil(self._channel(self.beta_slow))
        first, last = max(0, first), min(self.dimensions - 1, last)
        ramp = np.clip((np.arange(self.dimensions // 2) - first) / max(0.001, last - first), 0, 1)
        return frequencies * (1 - ramp) + frequencies / self.factor * ramp, yarn_attention(self.factor) * self.attention

    def _channel(self, turns: float) -> float:
        """The channel pair that turns so often in the original context."""
        return self.dimensions * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.base))


def yarn_attention(factor: float) -> float:
    """YaRN's own attention factor (Peng et al., ICLR 2024, equation 15)."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def of_model(decoder: Decoder, architecture: str) -> Positions:
    """The positions of a model.

    Args:
        decoder: the model.
        architecture: its name in GGUF.

    Raises:
        FedgroveError: GGUF cannot say them; names the type of the positions.
    """
    config = decoder.checkpoint.config
    rope = config.rope_parameters
    kind = rope["rope_type"]
    if kind == "dynamic":
        raise FedgroveError(
            "--to gguf: positions of type 'dynamic' change with the length of the text, and llama.cpp has no such positions",
            "export --to hf; llama.cpp's convert_hf_to_gguf.py would leave the scaling out",
        )
    dimensions = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    base, factor, context = rope["rope_theta"], rope.get("factor"), rope.get("original_max_position_embeddings")
    plain = Positions(dimensions, base)
    if kind == "default":
        positions = plain
    elif kind == "linear":
        positions = Positions(dimensions, base, kind, factor)
    elif kind == "yarn":
        factor = factor or config.max_position_embeddings / context
        betas = rope.get("beta_fast") or 32.0, rope.get("beta_slow") or 1.0
        attention = _expected(decoder)[1] / yarn_attention(factor)
        positions = Positions(dimensions, base, kind, factor, context, *betas, attention)
    elif kind == "llama3" and architecture in WITH_DIVISORS:
        turns = context * plain.frequencies()[0] / (2 * math.pi)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        positions = Positions(dimensions, base, divisors=(1 / ((1 - smooth) / factor + smooth)).astype(np.float32))
    else:
        raise FedgroveError(
            f"--to gguf: positions of type {kind!r} are not supported in a {architecture} file",
            ELSEWHERE,
        )
    if not are_those_of(positions, decoder):
        raise FedgroveError(f"--to gguf: these settings of positions of type {kind!r} cannot be written", ELSEWHERE)
    return positions


def are_those_of(positions: Positions, decoder: Decoder) -> bool:
    """Whether llama.cpp would rotate with the frequencies with which transformers rotates."""
    got, attention = positions.frequencies()
    wanted, wanted_attention = _expected(decoder)
    return got.shape == wanted.shape and np.allclose([*got, attention], [*wanted, wanted_attention], rtol=CLOSE, atol=0)


def write(writer: Any, positions: Positions) -> None:
    """Adds the keys to a ``gguf.GGUFWriter``; the caller writes the tensor of divisors."""
    import gguf

    writer.add_rope_dimension_count(positions.dimensions)
    writer.add_rope_freq_base(positions.base)
    if positions.scaling == "none":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(positions.scaling))
    writer.add_rope_scaling_factor(positions.factor)
    if positions.scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(positions.original_context)
        writer.add_rope_scaling_yarn_beta_fast(positions.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(positions.beta_slow)
        writer.add_rope_scaling_attn_factors(positions.attention)


def read(reader: Any) -> Positions:
    """The positions in a file that a ``gguf.GGUFReader`` has opened, with llama.cpp's defaults."""
    architecture = reader.get_field("general.architecture").contents()

    def value(key: str, default: Any) -> Any:
        field = reader.get_field(f"{architecture}.{key}")
        return default if field is None else field.contents()

    divisors = [tensor.data for tensor in reader.tensors if tensor.name == DIVISORS]
    heads, width = value("attention.head_count", 1), value("embedding_length", 0)
    factor = value("rope.scaling.factor", 1.0)
    return Positions(
        dimensions=value("rope.dimension_count", value("attention.key_length", width // heads)),
        base=value("rope.freq_base", 10000.0),
        scaling=value("rope.scaling.type", "linear"),
        factor=factor,
        original_context=value("rope.scaling.original_context_length", value("context_length", 0)),
        beta_fast=value("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=value("rope.scaling.yarn_beta_slow", 1.0),
        attention=value("rope.scaling.attn_factor", 1.0),
        divisors=divisors[0] if divisors else None,
    )


def _expected(decoder: Decoder) -> tuple[NDArray[np.float64], float]:
    """The frequencies and the attention factor with which transformers rotates; all layers share them."""
    rotary = cast(Any, decoder.model.get_submodule("model.rotary_emb"))
    return rotary.inv_freq.double().numpy(), float(rotary.attention_scaling)
