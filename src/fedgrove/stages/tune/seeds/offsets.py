"""The sum of all steps so far, weight by weight, in whole numbers: S = Σ c·z, kept between requests and brought up to date.

A step along direction s changes the integer coefficient c_s, in units of 2⁻⁴⁰ of weight. Integers add in any order, so S
is the same whether it is computed at once, step by step, for some tensors before others, or after a restart. FedKSeed
replays every seed in floating point, where each seed is rounded to the model's dtype, and small ones are lost.

A tensor's file also contains the coefficients that it is the sum of: whoever needs other coefficients adds the difference.
A file that is missing or damaged is computed again from zero.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedgrove.models.signs import add_directions, chunks, key_of
from fedgrove.models.tensor_files import save_tensors

UNIT = 2.0**-40  # of a coefficient, in units of weight
MOST_DIRECTIONS = 2**16  # with coefficients up to LARGEST no sum leaves int64
LARGEST = 2**46  # |coefficient|: a weight that moves by 64 along one direction is no tuning


class Offsets:
    """S of each tensor, (its shape) int64, on disk or in memory.

    Args:
        folder: for the files.
        seed: of the stage, ``{job seed}/{stage}``.
        in_memory: keep what was read until :meth:`flush`; else each tensor is read and written whenever it is asked for.
    """

    def __init__(self, folder: Path, seed: str, in_memory: bool = False):
        self._folder, self._seed, self._in_memory = folder, seed, in_memory
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def at(self, name: str, shape: torch.Size, coefficients: Tensor) -> Tensor:
        """S of one tensor.

        Args:
            name: of the tensor in the checkpoint.
            shape: of the tensor in the checkpoint.
            coefficients: (directions,) int64, at most ``MOST_DIRECTIONS`` numbers up to ``LARGEST``.

        Returns:
            int64 on the CPU, not to be changed.
        """
        total, done = self._kept.get(name) or self._read(name, shape)
        size = max(len(done), len(coefficients))
        missing = torch.nn.functional.pad(coefficients, (0, size - len(coefficients)))
        missing = missing - torch.nn.functional.pad(done, (0, size - len(done)))
        if missing.any():
            found = missing.nonzero().flatten().tolist()
            add_directions(total, key_of(self._seed, name), {index: int(missing[index]) for index in found})
            done = coefficients.clone()
            if not self._in_memory:
                self._write(name, total, done)
        if self._in_memory:
            self._kept[name] = total, done
        return total

    def flush(self) -> None:
        """Writes what is kept in memory."""
        for name, (total, done) in self._kept.items():
            self._write(name, total, done)

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _write(self, name: str, total: Tensor, done: Tensor) -> None:
        save_tensors({"sum": total, "coefficients": done}, self._file(name), {"seed": self._seed})

    def _read(self, name: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
        try:
            with safe_open(self._file(name), framework="pt") as file:
                total, done = file.get_tensor("sum"), file.get_tensor("coefficients")
                if (file.metadata() or {}).get("seed") == self._seed and total.shape == shape:
                    return total.clone(), done.clone()  # else the file's pages stay in memory
        except (SafetensorError, OSError):
            pass
        return torch.zeros(shape, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)


def moved(weight: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """weight + S·2⁻⁴⁰, computed in float64 and rounded once, in pieces: a whole matrix in float64 would be in memory twice.

    Args:
        weight: any float dtype and device.
        offset: of its shape, int64.
        dtype: of the result.
    """
    result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    flat, before, by = result.view(-1), weight.reshape(-1), offset.reshape(-1)
    for start, count in chunks(weight.numel()):
        part = slice(start, start + count)
        flat[part] = before[part].double().add_(by[part].to(weight.device).double(), alpha=UNIT)
    return result


def masked_merge(before: Tensor, after: Tensor) -> Tensor:
    """The weight with all steps, with the zeros that it had; and no other weight becomes zero."""
    return torch.where((before == 0) | (after == 0), before, after)
