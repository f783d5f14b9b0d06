"""Evaluates one model with several metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedgrove.evaluation.metrics import Measured, bootstrap
from fedgrove.evaluation.metrics.accuracy import Answers, accuracy, answer
from fedgrove.events import Listener, OnProgress, Phase
from fedgrove.job.units import ComputeDtype
from fedgrove.models.blocks import Decoder
from fedgrove.models.compute import dtype_of
from fedgrove.models.perplexity import negative_log_likelihoods, perplexity_of
from fedgrove.models.preconditions import check_finite, check_length, check_parameters, check_vocabulary
from fedgrove.models.stream import Checkpoint


class Examiner:
    """Evaluates one model. Perplexity loads it block by block; the other metrics load the full model into memory."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", compute_dtype: ComputeDtype | None = None):
        self._checkpoint = checkpoint
        self._device = device
        self._dtype = dtype_of(compute_dtype, device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; perplexity takes windows and does without."""
        return self._checkpoint.tokenizer()

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self._checkpoint, self._device, self._dtype)

    @cached_property
    def _model(self) -> nn.Module:
        return Decoder(self._checkpoint, self._device, self._dtype).load_all()

    @classmethod
    def of(cls, model: Path, length: int, device: str = "cpu") -> Examiner:
        """Opens a model that a user names, with the checks that one has to pass.

        Args:
            model: a model directory.
            length: tokens of a window, or of a prompt with its label; ``--length``.
            device: the torch device.

        Raises:
            FedgroveError: it is no model that can be measured so; in one line.
        """
        checkpoint = Checkpoint(model)
        decoder = Decoder(checkpoint)
        check_parameters(decoder)
        check_finite(checkpoint)
        check_length(decoder, length, "--length")
        examiner = cls(checkpoint, device)
        check_vocabulary(examiner.tokenizer, decoder)
        return examiner

    def perplexity(self, windows: Sequence[Tensor], on_progress: OnProgress) -> dict[str, Measured]:
        """exp of the mean negative log-likelihood; the interval is from resampled windows."""
        each = negative_log_likelihoods(self._decoder, windows, on_progress)
        return {"perplexity": replace(bootstrap(each, lambda sums: perplexity_of(sums[0], sums[1])), parts=each)}

    def answers(
        self,
        measure: str,
        pairs: Sequence[tuple[str, str]],
        on_progress: OnProgress,
        labels: Sequence[str] = (),
        length: int = 512,
        tokens: int = 64,
    ) -> dict[str, Measured]:
        """The metrics of ``measure``, "accuracy" or "generation", on (prompt, answer) pairs."""
        if measure == "accuracy":
            return accuracy(self._model, self.tokenizer, pairs, labels, length, on_progress)
        from fedgrove.evaluation.metrics.generation import compare, write

        return compare(write(self._model, self.tokenizer, pairs, tokens, on_progress))

    def choices(self, pairs: Sequence[tuple[str, str]], labels: Sequence[str], length: int, on_progress: OnProgress) -> Answers:
        """What the model chooses for each prompt, of all possible answers; see :func:`answer`."""
        return answer(self._model, self.tokenizer, pairs, labels, length, on_progress)


def examine_directory(
    model: Path,
    listener: Listener,
    *,
    speed: bool = False,
    tasks: Sequence[str] = (),
    tasks_from: Path | None = None,
    limit: int | None = None,
    dtype: str = "auto",
) -> dict[str, dict[str, float]]:
    """Measurements of a model directory in plain transformers: named numbers, by "speed" and by task."""
    metrics: dict[str, dict[str, float]] = {}
    if speed:
        from fedgrove.evaluation.metrics.speed import speed as measure_speed

        listener.on_event(Phase("evaluate", f"speed of {model}"))
        metrics["speed"] = plain(measure_speed(model, dtype))
    if tasks:
        from fedgrove.evaluation.metrics.harness import harness

        listener.on_event(Phase("evaluate", ", ".join(tasks)))
        metrics |= {task: plain(measured) for task, measured in harness(model, tasks, tasks_from, limit, dtype).items()}
    return metrics


def plain(measured: Mapping[str, Measured]) -> dict[str, float]:
    """Named numbers and the ends of their intervals."""
    return {key: number for name, value in measured.items() for key, number in value.plain(name).items()}
