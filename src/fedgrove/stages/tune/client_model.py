"""What all requests of a tuning stage have in common: which model a client tunes, and on which windows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator
from safetensors import safe_open
from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.client.server_weights import check_kept_blocks
from fedgrove.client.windows import checkpoint_of, latest_decoder, training_windows
from fedgrove.files import write_atomically
from fedgrove.job.stage_config import Agreed, Cut, cut_by
from fedgrove.job.units import MAX_BLOCKS, Bits, HeldOut, Length, Natural, Word
from fedgrove.models.blocks import Decoder
from fedgrove.models.depth import KeptBlocks, num_blocks
from fedgrove.models.expert_cut import MAX_EXPERTS, KeptExperts, SentExperts, check_kept, routing_of
from fedgrove.models.stream import Checkpoint
from fedgrove.models.width import width_of
from fedgrove.rounds.request import Request
from fedgrove.rounds.wire import WireError
from fedgrove.stages.tune.config import Config
from fedgrove.stages.tune.fixed_point import FixedPointChanges

DIGEST = "request"  # in a file's metadata: the hash of the request that brought it


class TuneRequest(Request):
    """A request that needs the model of a tuning stage.

    Attributes:
        parts: how many files the client has stored for :class:`~fedgrove.stages.tune.exchanges.base.KeepWeights`.
        base_digest: :func:`digest_of_base` of these requests: whoever compares requests also compares models.
        cut: the fractions that earlier stages cut out of the client's own copy of the model; None: nothing.
        kept_blocks: the indexes of the blocks of its own copy that the model has; None: all.
        kept_experts: the indexes of the experts of its own copy that the model has, by block; None: all.
        held: of every block, how many of the model's experts the client has in memory: those that it chose for
            :class:`~fedgrove.stages.tune.exchanges.experts.ChooseExperts`; None: all.
        bits: of each frozen weight.
        length: tokens of a window.
        seed: of the stage.
        personal: the fraction of its windows that the client holds out.
    """

    parts: Annotated[int, Field(ge=0, le=MAX_BLOCKS)]
    base_digest: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    cut: Cut | None
    kept_blocks: KeptBlocks | None = None
    kept_experts: SentExperts | None = None
    held: Annotated[int, Field(ge=1, le=MAX_EXPERTS)] | None = None
    bits: Bits
    length: Length
    seed: Word
    personal: HeldOut

    def model_and_windows(self, client: LocalClient, device: str) -> tuple[Decoder, Tensor, Tensor]:
        """The model without adapters, and this client's windows: token ids and labels, (windows, length) each.

        Raises:
            FedgroveError: the files of :class:`~fedgrove.stages.tune.exchanges.base.KeepWeights` are missing, or hold another
                model.
        """
        folder = base_folder(client, self.stage)
        files = sorted(folder.glob("part-*.safetensors"))
        if len(files) != self.parts and (self.parts or files):
            raise client.error("its working files are gone; continue the run with --resume")
        if digest_of_base([_digest_of(file) for file in files] if self.parts else []) != self.base_digest:
            raise client.error("the model that it was sent is not the one that this request is for; continue with --resume")
        check_kept_blocks(self.kept_blocks, self.cut, client)
        overlays = [folder] if self.parts else []
        kept_experts = kept_of(client, self.kept_experts, self.cut)
        checkpoint = checkpoint_of(client).over(*overlays, kept_blocks=self.kept_blocks, kept_experts=kept_experts)
        if self.cut is not None:
            checkpoint = self._narrowed(self.cut, checkpoint, client)
        held = None if self.held is None else read_held(client, self.stage, self.held, self.base_digest)
        decoder = latest_decoder(checkpoint, device, same=self.base_digest, held=held)
        if self.parts or (self.cut is not None and not self.cut.experts):
            _check_width(decoder, client)
        return decoder, *training_windows(client, self.length)

    def beyond(self, job: Agreed) -> str | None:
        config, before = job.stages[self.stage], job.stages[: self.stage]
        assert isinstance(config, Config)
        if self.length != config.length:
            return "length"
        if self.seed != job.seed_of(self.stage):
            return "seed"
        if self.parts and not before:
            return "parts"
        cut = cut_by(before)
        if self.cut != cut:
            return "cut"
        if (self.kept_blocks is not None) != bool(cut and cut.depth):
            return "kept_blocks"
        if (self.kept_experts is not None) != bool(cut and cut.experts):
            return "kept_experts"
        if self.held is not None and (config.hold_experts != "fit" or config.epsilon is not None):
            return "held"
        if self.bits not in config.weight_bits:
            return "bits"
        return "personal" if self.personal != config.personal else None

    def _narrowed(self, cut: Cut, checkpoint: Checkpoint, client: LocalClient) -> Checkpoint:
        """The checkpoint with the widths that the cut leaves."""
        if not (cut.channels or cut.heads):
            return checkpoint
        return checkpoint.over(width=width_of(checkpoint_of(client).config).without(cut))


class TrainingRequest(TuneRequest):
    """A request whose response is weighted by the number of tokens of the client's text.

    Attributes:
        tokens: of the client's text, as the client reported it.
        fixed: the settings of fixed-point numbers; None: floats.
    """

    tokens: Natural
    fixed: FixedPointChanges | None = None

    @model_validator(mode="after")
    def _has_weight(self) -> Self:
        if self.fixed is not None and self.weight > 1:
            raise ValueError("fixed.everything: it is less than this client's part")
        return self

    @property
    def weight(self) -> float:
        """The client's weight in a sum of fixed-point numbers."""
        assert self.fixed is not None
        return self.fixed.weight(self.tokens)

    def model_and_windows(self, client: LocalClient, device: str) -> tuple[Decoder, Tensor, Tensor]:
        """As :meth:`TuneRequest.model_and_windows`; also refuses another number of tokens than the windows have."""
        decoder, ids, labels = super().model_and_windows(client, device)
        chosen = self.chosen_windows(client, len(ids))
        if chosen is not None:
            ids, labels = ids[chosen], labels[chosen]
        if self.tokens != ids.numel():
            raise client.error(f"the request is for {self.tokens} tokens, but its text has {ids.numel()}; refused")
        return decoder, ids, labels

    def chosen_windows(self, client: LocalClient, windows: int) -> Tensor | None:
        """Which of so many windows of its text the client uses, (windows,) bool; None: all."""
        return None

    def check_tokens(self, claimed: int) -> None:
        """Checks that a client claims the number of tokens that it reported before.

        Raises:
            WireError: the numbers differ.
        """
        if claimed != self.tokens:
            raise WireError(f"it claims {claimed} tokens, but it reported {self.tokens} before")


def kept_of(client: LocalClient, sent: SentExperts | None, cut: Cut | None) -> KeptExperts | None:
    """The experts that an earlier stage left, as a request names them.

    Refuses experts that cannot be those that the job's cut leaves.

    Args:
        cut: the fractions that earlier stages cut out; None: nothing.

    Raises:
        FedgroveError: they are others, in one line.
    """
    if sent is None:
        return None
    own, kept = checkpoint_of(client), dict(sent)
    routing = routing_of(own.config)
    wrong = check_kept(kept, own.names(), routing, routing.left(cut.experts if cut else 0.0), num_blocks(own.config))
    if wrong is not None:
        raise client.error(f"the request is for a model with {wrong}; refused")
    return kept


def keep_held(client: LocalClient, stage: int, held: KeptExperts, base_digest: str) -> None:
    """Stores which experts the client holds in a stage, on its own disk.

    Raises:
        FedgroveError: it chose another number before: several choices would rank its experts.
    """
    file, number = _held_file(client, stage), len(next(iter(held.values())))
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))["held"]
        if any(len(experts) != number for experts in before.values()):
            raise client.error("the request is for another number of experts than it chose before; refused")
    facts = {"base": base_digest, "held": {str(block): list(experts) for block, experts in held.items()}}
    write_atomically(file, json.dumps(facts))


def read_held(client: LocalClient, stage: int, number: int, base_digest: str) -> KeptExperts:
    """The experts that the client chose to hold.

    Raises:
        FedgroveError: it chose none, or for another model, or another number.
    """
    file = _held_file(client, stage)
    if not file.is_file():
        raise client.error("its working files are gone; continue the run with --resume")
    facts = json.loads(file.read_text(encoding="utf-8"))
    held = {int(block): tuple(experts) for block, experts in facts["held"].items()}
    if facts["base"] != base_digest or any(len(experts) != number for experts in held.values()):
        raise client.error("it chose its experts for another model or number; continue the run with --resume")
    return held


def _held_file(client: LocalClient, stage: int) -> Path:
    return client.folder / f"experts-{stage}.json"


def _check_width(decoder: Decoder, client: LocalClient) -> None:
    """Refuses a width that is not the one of the weights that the client was sent."""
    for block in range(len(decoder)):
        for name, stored in decoder.block_names(block).items():
            if sorted(decoder.checkpoint.spec(stored)[0]) != sorted(decoder.read_shape(f"{decoder.prefix}.{block}.{name}")):
                raise client.error("the request is for a model of another width than the one that it was sent; refused")


def digest_of_base(digests: list[str]) -> str:
    """A hash of the requests by which a client was sent a stage's model; empty without any.

    Args:
        digests: :meth:`~fedgrove.rounds.request.Request.sum_digest` of each, in their order.
    """
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if digests else ""


def _digest_of(file: Path) -> str:
    with safe_open(file, framework="pt") as opened:
        metadata: dict[str, str] = opened.metadata() or {}
        return metadata.get(DIGEST, "")


def base_folder(client: LocalClient, stage: int) -> Path:
    """Where a client stores the weights that earlier stages changed."""
    return client.folder / f"base-{stage}"


def alone_folder(client: LocalClient, stage: int) -> Path:
    """Where a client stores the model that it would have alone, while it is measured."""
    return client.folder / f"alone-{stage}"


def own_experts_folder(client: LocalClient, stage: int) -> Path:
    """Where a client stores the smaller model of the experts that matter to its text."""
    return client.folder / "personal" / f"experts-{stage}"


def best_folder(client: LocalClient, stage: int) -> Path:
    """Where a client stores its own best change."""
    return client.folder / f"best-{stage}"
