"""Every client prunes for itself with its own sums and a part of the others', and keeps what is best on its held-out text.

After the sums of a block are opened they go back to the clients in them. The server learns nothing by that: what a client
prunes, which part it chooses and the windows it chooses by stay with it. See :mod:`fedgrove.stages.prune.personal`.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from fedgrove.client.hidden_states import Calibration
from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import checkpoint_of, decoder_of, held_out_windows
from fedgrove.evaluation.held_out import Losses, Parts, error_of_difference, mean_of
from fedgrove.files import write_atomically
from fedgrove.input_statistics.exchange import SCALE
from fedgrove.input_statistics.fixed_point import LARGEST
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import MAX_BLOCKS, MOST_HELD_OUT, Count, Index, Name, NonNegative, Sparsity
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.masks import Target
from fedgrove.models.perplexity import negative_log_likelihoods
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.request import CHANGE, Disclosure, Reply, Request, Response, Tensors
from fedgrove.rounds.wire import WireError
from fedgrove.stages.prune.config import Config
from fedgrove.stages.prune.exchanges.statistics import SumInputs
from fedgrove.stages.prune.personal import OTHERS_WEIGHTS, candidate_file, candidates_folder, chosen, own_folder, with_others
from fedgrove.stages.prune.pruners import Damping, pruner_of
from fedgrove.stages.prune.solving import prune_by_magnitude, prune_linear, statistics_of

POOLED = "pooled/"  # tensors of a request: the sums over all clients' text
CHOICE = "choice.json"  # in the folder of a client's own model: what it measured and chose


class OwnModel(Request):
    """What both requests have.

    Attributes:
        calibration: the windows that the client calibrates on.
        held_out: how many more windows it draws, and holds out.
    """

    calibration: Calibration
    held_out: Annotated[int, Field(ge=2, le=MOST_HELD_OUT)]

    def held_out_ids(self, client: LocalClient) -> Tensor:
        """The windows that the client holds out, (windows, length) int64."""
        wanted = self.calibration
        return held_out_windows(client, wanted.samples, wanted.length, wanted.seed, self.held_out)

    def own_beyond(self, config: Config) -> str | None:
        """As :meth:`~fedgrove.rounds.request.Request.beyond`, for the fields that both requests have."""
        calibration = self.calibration
        if not config.personal or self.held_out != config.windows_held_out(calibration.samples):
            return "personal"
        if (calibration.through, calibration.windows_per_run) != (config.calibration_source, 1):
            return "source"
        return "compute_dtype" if calibration.compute_dtype != config.compute_dtype else None


class SolveOwnBlock(OwnModel):
    """Prune one block for yourself, with your own sums and parts of everybody's. Nothing is sent.

    Tensors sent with the request: ``scale/<input>`` as for the sums, and ``pooled/<input>/squares`` and so on, the opened sums
    in the form of a response to :class:`~fedgrove.stages.prune.exchanges.statistics.SumInputs`. The client sums its own text
    again rather than keep its sums of every block on its disk.

    Attributes:
        block: the block to prune.
        statistics: the request for its sums that the client answered; None: no sums are made of it, so it is pruned by
            magnitude (``protect_first_block``).
        tokens: of all clients, in the opened sums.
        pruner, damping, sparsity, pattern: see :class:`~fedgrove.stages.prune.recipe.Recipe`.
    """

    KIND: ClassVar[str] = "prune/personal/block"

    block: Annotated[Index, Field(lt=MAX_BLOCKS)]
    statistics: SumInputs | None
    tokens: Count
    pruner: Name
    damping: Damping
    sparsity: Sparsity
    pattern: tuple[Count, Count] | None

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        shutil.rmtree(own_folder(client, self.stage), ignore_errors=True)  # of an earlier attempt
        self.held_out_ids(client)  # too little text is an error now, and not after the last block
        decoder = decoder_of(client, device, self.calibration.compute_dtype)
        if self.block >= len(decoder):
            raise client.error(f"its model has {len(decoder)} blocks, but the request is for block {self.block}")
        own, pooled = self._sums(tensors, client, device)
        for index, others_weight in enumerate(OTHERS_WEIGHTS):
            try:
                pruned = {name: weight for name, weight, _ in self._pruned(decoder, tensors, own, pooled, others_weight)}
            except ValueError as error:
                what = f"block {self.block} cannot be pruned with its own sums: {error}"
                raise client.error(what, "raise samples") from error
            save_tensors(self._stored(decoder, pruned), candidate_file(client, self.stage, index, self.block))
        return Response({}, Reply())

    def _pruned(
        self, decoder: Decoder, tensors: Tensors, own: Tensors, pooled: Tensors, others_weight: float
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        target = Target(self.sparsity, self.pattern)
        if self.statistics is None:
            yield from prune_by_magnitude(decoder, self.block, target)
            return
        own_tokens = self.calibration.tokens
        tokens = own_tokens + others_weight * (self.tokens - own_tokens)
        for first in self.statistics.widths:
            of_input = {name: total for name, total in pooled.items() if name.startswith(f"{first}/")}
            sums = with_others(own, of_input, others_weight)
            moments = pruner_of(self.pruner).NEEDS == "moments"
            known = statistics_of(sums, first, tensors[SCALE + first], tokens, decoder.device, moments)
            del sums
            for name in (name for name, read in self.statistics.consumers.items() if read == first):
                yield name, *prune_linear(decoder, self.block, name, known, self.pruner, target, self.damping)

    def _stored(self, decoder: Decoder, pruned: Tensors) -> Tensors:
        names = decoder.block_names(self.block)
        return {
            names[name]: as_matrix(decoder.blocks[self.block].get_submodule(name), weight).contiguous()
            for name, weight in pruned.items()
        }

    def _sums(self, tensors: Tensors, client: LocalClient, device: str) -> tuple[Tensors, Tensors]:
        """The client's own sums and the opened ones, by name.

        Raises:
            FedgroveError: the opened sums cannot hold the client's own.
        """
        pooled = {name.removeprefix(POOLED): total for name, total in tensors.items() if name.startswith(POOLED)}
        if self.statistics is None:
            if pooled:
                raise client.error("sums came for a block of which none are made; refused")
            return {}, {}
        scales = {name: scale for name, scale in tensors.items() if name.startswith(SCALE)}
        answer = self.statistics.respond(scales, client, device).tensors
        own = {name.removeprefix(CHANGE): total.cpu() for name, total in answer.items()}
        try:
            self._check(self.statistics, own, pooled)
        except WireError as error:
            raise client.error(f"the sums of all clients that came cannot hold its own: {error}; refused") from error
        return own, pooled

    def _check(self, request: SumInputs, own: Tensors, pooled: Tensors) -> None:
        """Refuses sums that no other clients' text can make of the client's own.

        The numbers are integers, so what the others added has to be sums of theirs, exactly.
        """
        windows, own_windows = self.tokens // request.calibration.length, request.calibration.samples
        request.check_total({CHANGE + name: total for name, total in pooled.items()}, windows, LARGEST, noisy=False)
        others = {CHANGE + name: pooled[name] - total for name, total in own.items()}
        request.check_total(others, windows - own_windows, LARGEST, noisy=False)
        if windows == own_windows and any(bool(total.any()) for total in others.values()):
            raise WireError("nobody else's text is in them, but they differ")

    def beyond(self, job: Agreed) -> str | None:
        config, request = job.stages[self.stage], self.statistics
        assert isinstance(config, Config)
        field = self.own_beyond(config)
        if field is not None:
            return field
        if (request is None) != (config.protect_first_block and self.block == 0):
            return "protect_first_block"
        if request is not None:
            own = (self.stage, self.round, self.block, self.calibration)
            if (request.stage, request.round, request.block, request.calibration) != own:
                return "statistics"
            field = request.beyond(job)
            if field is not None:
                return field
        if self.tokens not in [number * self.calibration.tokens for number in range(1, len(job.clients) + 1)]:
            return "tokens"
        asked = {"pruner": self.pruner, "damping": self.damping, "pattern": self.pattern}
        agreed: dict[str, Any] = {"pruner": config.pruner, "damping": config.damping_mode}
        agreed["pattern"] = config.kept_of if config.pattern else None
        least, most = config.sparsity_range
        differs = next((key for key in asked if asked[key] != agreed[key]), None)
        return differs or (None if least <= self.sparsity <= most else "sparsity")


class OwnLosses(Losses):
    """Losses with the shared model and with the client's own, and with the one that it would have alone (λ = 0)."""

    alone: NonNegative | None = None


class ChooseOwn(OwnModel):
    """Keep, of the models that you pruned for yourself, the one that takes most from the others and is good on your text.

    It is written to ``personal/stage-N`` of the client's folder and never sent, unless the shared model is chosen. What was
    measured and chosen stands in ``choice.json`` beside it.

    Attributes:
        tell: whether the losses on the half of the held-out windows that was not chosen by are sent.
    """

    KIND: ClassVar[str] = "prune/personal/choose"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.HELD_OUT_LOSSES})
    REPLY: ClassVar[type[Reply]] = OwnLosses

    tell: bool

    def discloses(self) -> frozenset[Disclosure]:
        return self.DISCLOSES if self.tell else frozenset()

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        record = own_folder(client, self.stage) / CHOICE
        if not record.is_file():  # else the request came again
            blocks, candidates = range(len(decoder_of(client, device))), range(len(OTHERS_WEIGHTS))
            if not all(candidate_file(client, self.stage, i, block).is_file() for i in candidates for block in blocks):
                return Response({}, OwnLosses())  # it was not in the sums of every block
            self._choose(client, device)
        shutil.rmtree(candidates_folder(client, self.stage), ignore_errors=True)
        losses = OwnLosses.model_validate(json.loads(record.read_text(encoding="utf-8"))["losses"])
        return Response({}, losses if self.tell else OwnLosses())

    def _choose(self, client: LocalClient, device: str) -> None:
        """Measures every candidate, writes the chosen model and, after it, what was measured."""
        windows = [ids[None] for ids in self.held_out_ids(client)]
        found: list[tuple[Parts, Parts]] = []
        overlays = [candidate_file(client, self.stage, index, 0).parent for index in range(len(OTHERS_WEIGHTS))]
        for overlay in overlays:
            each = negative_log_likelihoods(Decoder(checkpoint_of(client).over(overlay), device), windows)
            found.append((each[::2], each[1::2]))
        choose, report = [mean_of(half) for half, _ in found], [mean_of(half) for _, half in found]
        if not all(map(math.isfinite, (*choose, *report))):
            raise client.error("the loss of a model that it pruned for itself is not finite", 'try model.dtype = "float32"')
        index, last = chosen(choose), len(OTHERS_WEIGHTS) - 1
        folder = own_folder(client, self.stage)
        shutil.rmtree(folder, ignore_errors=True)
        if index != last:
            checkpoint_of(client).over(overlays[index]).write(folder)
        error = error_of_difference(found[index][1], found[last][1])
        losses = OwnLosses(shared=report[last], own=report[index], alone=report[0], error=error, keeps_own=index != last)
        measured = [
            {"others_weight": weight, "loss_to_choose": one, "loss_to_report": other}
            for weight, one, other in zip(OTHERS_WEIGHTS, choose, report, strict=True)
        ]
        content = {"others_weight": OTHERS_WEIGHTS[index], "measured": measured, "losses": losses.model_dump(mode="json")}
        write_atomically(folder / CHOICE, json.dumps(content, indent=2) + "\n")

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, OwnLosses)
        reply.check()
        if (reply.alone is None) != (reply.own is None) or (reply.own is not None and not self.tell):
            raise WireError("it has other losses than it was asked for")

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        return "secure_aggregation" if self.tell == job.secure else self.own_beyond(config)
