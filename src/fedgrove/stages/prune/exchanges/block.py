"""Every client prunes one block on its own text; the server sums the responses, whose content the aggregation defines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor

from fedgrove import heap
from fedgrove.client.hidden_states import Calibration, HiddenStates, Tokens
from fedgrove.client.local_client import LocalClient
from fedgrove.client.server_weights import start_of
from fedgrove.client.windows import calibration_windows, decoder_of
from fedgrove.errors import FedgroveError
from fedgrove.job.stage_config import Agreed
from fedgrove.job.units import Index, Name, Positive
from fedgrove.models.blocks import Decoder, as_matrix
from fedgrove.models.replaced_blocks import Call
from fedgrove.models.tensor_files import save_tensors
from fedgrove.rounds.aggregator.fixed_point import OutOfRange
from fedgrove.rounds.aggregator.trimmed import TrimmedSum
from fedgrove.rounds.aggregator.weighted_sum import WeightedSum
from fedgrove.rounds.request import CHANGE, WEIGHT, Disclosure, Message, Reply, Request, Response, Tensors, TensorSpecs
from fedgrove.rounds.wire import WireError
from fedgrove.stages.prune import pruners
from fedgrove.stages.prune.aggregation import ClientSolved, client_solved
from fedgrove.stages.prune.calibration_pass import gather, windows_at_once
from fedgrove.stages.prune.config import Config
from fedgrove.stages.prune.fixed_weights import GROWTH, VALUE_BITS, FixedWeights, unit_of
from fedgrove.stages.prune.recipe import Recipe
from fedgrove.stages.prune.shared import add_uses, complete_names, forget_sums, read_sums, sums_file, write_sums


class PruneBlock(Request):
    """Prune one block on your own text, and send its weights, its mask, or both, as the aggregation requires.

    A client makes one calibration pass per round. If ``through`` is the recipe's, hidden states pass through the blocks that
    the client has pruned, and through its own dense copies of the blocks that it was not assigned. If it is "dense", they pass
    through all blocks unpruned, in the same forward pass that sums the statistics. Hidden states are cached on the client's
    disk between requests. If the cache is gone, the pass starts again and gives the same hidden states; where weights came with
    the request, a client that has already been assigned an earlier block of the round cannot do this, and fails.

    Tensors sent with the request: ``start/<linear>``: (out, in), the weights to prune instead of the dense copy's. The response
    holds ``change/<linear>`` and ``weight/<linear>``, as the aggregation's ``weigh`` defines them; encoded as integers if
    ``fixed_point`` is given.

    Attributes:
        block: the block to prune.
        calibration: the windows, and what they pass through.
        recipe: how to prune.
        aggregation: see :mod:`fedgrove.stages.prune.aggregation`.
        max_weight_growth: the key of the stage's table; the server refuses weights that have grown more.
        keep: store the pruned block on the client's disk, to measure the model that the client would have alone.
        fixed_point: how weights are encoded under secure aggregation; None without secure aggregation.
    """

    KIND: ClassVar[str] = "prune/block"
    DISCLOSES: ClassVar[frozenset[Disclosure]] = frozenset({Disclosure.MASKS, Disclosure.WEIGHTS})
    REPLY: ClassVar[type[Reply]] = Tokens
    OWN_FIELDS: ClassVar[frozenset[str] | None] = frozenset(
        {"calibration.samples", "calibration.windows_per_run", "calibration.through", "recipe.sparsities", "recipe.blocks"}
    )
    SUM_FIELDS: ClassVar[tuple[str, ...]] = ("stage", "round", "block")

    block: Index
    calibration: Calibration
    recipe: Recipe
    aggregation: Name
    max_weight_growth: Positive | None = None
    keep: bool = False
    fixed_point: FixedWeights | None = None

    @model_validator(mode="after")
    def _has_block(self) -> Self:
        if self.block >= len(self.recipe.sparsities):
            raise ValueError(f"block: there is no block {self.block} of {len(self.recipe.sparsities)}")
        return self

    @property
    def method(self) -> ClientSolved:
        """The aggregation's file."""
        return client_solved(self.aggregation)

    def discloses(self) -> frozenset[Disclosure]:
        return self.method.SENDS

    def respond(self, tensors: Tensors, client: LocalClient, device: str) -> Response:
        method = self.method
        start = start_of(tensors, decoder_of(client, device, self.calibration.compute_dtype), self.block, client)
        if start and self.stage == self.round == 0:
            raise client.error("the server sent weights before any stage could have changed them; refused")
        sent: Tensors = {}
        own: Tensors = {}
        try:
            for name, before, after, mask in prune_block(self, start, client, device, own):
                change, weight = method.weigh(before, after, mask, self.calibration.tokens)
                if self.fixed_point is not None:
                    assert isinstance(weight, Tensor)
                    if self.fixed_point.units.get(name) != unit_of(before, self.fixed_point.clients):
                        raise client.error(f"the unit of the numbers of {name} does not follow from its weights; refused")
                    change = None if change is None else self.fixed_point.encode(name, change)
                    weight = weight.to(torch.uint8)
                if change is not None:
                    sent[CHANGE + name] = change
                sent[WEIGHT + name] = weight if isinstance(weight, Tensor) else torch.tensor(weight, dtype=torch.float64)
                del before, after, mask  # free these before the next iteration allocates its own
            if self.fixed_point is not None and len(self.fixed_point.units) != sum(name.startswith(WEIGHT) for name in sent):
                raise client.error("the request has units of linears that are not in the block; refused")
        except OutOfRange as error:
            raise client.error(
                f"a pruned weight is more than {GROWTH} times the largest weight before pruning; raise samples"
            ) from error
        return Response(sent, Tokens(tokens=self.calibration.tokens))

    def expected(self, layout: Decoder | None) -> TensorSpecs:
        assert layout is not None
        sends = self.method.SENDS
        expected: TensorSpecs = {}
        for name in complete_names(layout, self.block):
            blank = layout.blank_linear(self.block, name)
            if Disclosure.MASKS in sends:
                expected[WEIGHT + name] = (blank.shape, torch.bool if self.fixed_point is None else torch.uint8)
            else:
                expected[WEIGHT + name] = (torch.Size(()), torch.float64)
            if Disclosure.WEIGHTS in sends:
                expected[CHANGE + name] = (blank.shape, blank.dtype if self.fixed_point is None else torch.int64)
        return expected

    def check_reply(self, reply: Reply) -> None:
        assert isinstance(reply, Tokens)
        reply.check(self.calibration)

    def check(self, tensors: Tensors, reply: Reply, layout: Decoder | None) -> None:
        assert layout is not None
        target = self.recipe.target(self.block)
        for name in complete_names(layout, self.block):
            if self.max_weight_growth is not None:
                limit = self.max_weight_growth * float(layout.read_linear(self.block, name).abs().max())
                if float(tensors[CHANGE + name].abs().max()) > limit:
                    raise WireError(
                        f"{CHANGE}{name} is more than {self.max_weight_growth:g} times the largest weight before "
                        "(max_weight_growth)"
                    )
            weight = tensors[WEIGHT + name]
            if weight.dtype == torch.bool:
                pruned = weight.numel() - int(weight.sum())
                if pruned != target.num_pruned(weight.numel()):
                    raise WireError(f"{WEIGHT}{name} prunes {pruned} of {weight.numel()} weights, not {target} of them")
                if target.pattern and (weight.view(-1, target.pattern[1]).sum(1) != target.pattern[0]).any():
                    raise WireError(f"{WEIGHT}{name} does not follow the pattern {target}")
            elif float(weight) != self.calibration.tokens:
                raise WireError(f"{WEIGHT}{name} claims {float(weight):g} tokens")

    def beyond(self, job: Agreed) -> str | None:
        config = job.stages[self.stage]
        assert isinstance(config, Config)
        if config.method.SOLVED_AT != "client":
            return "kind"
        if (self.fixed_point is not None) != job.secure:
            return "fixed_point"
        if self.fixed_point is not None and self.fixed_point.clients > len(job.clients):
            return "fixed_point"
        return "blocks" if self.block not in self.recipe.blocks else self.pass_beyond(job)

    def pass_beyond(self, job: Agreed) -> str | None:
        """Like :meth:`beyond`, but also where no client sends blocks: only the client's pass and its pruning are compared."""
        config, calibration, recipe = job.stages[self.stage], self.calibration, self.recipe
        assert isinstance(config, Config)
        everything = tuple(range(1 if config.protect_first_block else 0, len(recipe.sparsities)))
        asked = {
            "pruner": recipe.pruner,
            "damping": recipe.damping,
            "pattern": recipe.pattern,
            "blocks": recipe.blocks if config.layers == "all" else None,
            "source": calibration.through,
            "compute_dtype": calibration.compute_dtype,
            "windows_per_run": calibration.windows_per_run,
            "aggregation": self.aggregation,
            "max_weight_growth": self.max_weight_growth,
            "keep": self.keep,
        }
        agreed = {
            "pruner": config.pruner,
            "damping": config.damping_mode,
            "pattern": config.kept_of if config.pattern else None,
            "blocks": everything if config.layers == "all" else None,
            "source": "dense" if config.calibration_source == "dense" else recipe.through,
            "compute_dtype": config.compute_dtype,
            "windows_per_run": windows_at_once(calibration.samples, calibration.length, config.compute_dtype),
            "aggregation": config.aggregation,
            "max_weight_growth": config.growth_limit,
            "keep": job.alone and self.stage == 0 and self.round == 0,
        }
        differs = next((key for key in asked if asked[key] != agreed[key]), None)
        least, most = config.sparsity_range
        outside = any(not least <= sparsity <= most for sparsity in recipe.sparsities)
        return differs or ("sparsities" if outside else None)


def prune_block(
    request: PruneBlock, start: Tensors, client: LocalClient, device: str, own: Tensors
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Continues the client's calibration pass up to a block, and prunes the block linear by linear.

    Args:
        start: (out, in) by linear: weights of the block to use instead of the checkpoint's.
        own: receives the pruned weights by linear, if they are needed for later blocks or for ``keep``.

    Yields:
        (linear, before, after, mask): the weights in the checkpoint's dtype, all three (out, in) on the CPU.

    Raises:
        FedgroveError: inputs are not finite, or the pass cannot start again because ``start`` has only this block's weights.
    """
    calibration, recipe, index = request.calibration, request.recipe, request.block
    decoder = decoder_of(client, device, calibration.compute_dtype)
    if len(recipe.sparsities) != len(decoder):
        raise client.error(f"its model has {len(decoder)} blocks, but the request is for one of {len(recipe.sparsities)}")
    shared, dense = bool(decoder.shared_linears), calibration.through == "dense"
    if shared and not dense:
        raise client.error("blocks of its model share weights, which can be pruned only with the inputs of the dense model")
    states = HiddenStates(client, calibration, decoder)
    at = states.latest(index)
    while shared and at and not sums_file(states.folder, at).is_file():  # it was interrupted between the two
        at = states.latest(at - 1)
    together = calibration.windows_per_run
    number = calibration.samples // together
    if at is None:
        texts = calibration_windows(client, calibration.samples, calibration.length, calibration.seed).view(
            number, together, -1
        )
        at = states.write(0, (decoder.embed(ids)[0] for ids in texts), number)
    calls = decoder.calls(together, calibration.length)
    decoder.forget_ends()
    more = index < max(recipe.blocks)  # the outputs of the client's last block are not needed

    def keep(outputs: Iterable[Tensor]) -> None:
        states.write(index + 1, outputs, number)

    for passed in range(at, index):
        mine: Tensors = {}
        if shared:
            _pass_shared(decoder, passed, calls[passed], states, recipe, number)
            continue
        if passed in recipe.blocks:
            if start:  # it has the weights of block ``index`` only, not those of earlier blocks
                raise client.error("its working files are gone; it can take part again next round")
            if not dense:
                result = _pruned(decoder, passed, calls[passed], states.read(passed), recipe, {})
                mine = {name: after for name, _, after, _ in result}
        with decoder.loaded(passed, mine) as block:
            states.write(passed + 1, (decoder.run(block, h, calls[passed]) for h in states.read(passed)), number)

    of_states = states.folder if shared else None
    outputs = keep if dense and more else None
    result = _pruned(decoder, index, calls[index], states.read(index), recipe, start, outputs, of_states)
    for name, before, after, mask in result:
        if request.keep or (more and not dense):
            own[name] = after
        yield name, before, after, mask
        del before, after, mask
    if more and not dense:
        with decoder.loaded(index, own) as block:
            keep(decoder.run(block, h, calls[index]) for h in states.read(index))
    states.forget(before=at)
    forget_sums(states.folder, before=at)
    if request.keep:
        names = decoder.block_names(index)
        stored = {names[name]: as_matrix(decoder.blocks[index].get_submodule(name), after) for name, after in own.items()}
        save_tensors(stored, alone_file(client, index))


def alone_file(client: LocalClient, block: int) -> Path:
    """Where a client keeps a block that it pruned by itself."""
    return client.folder / "alone" / f"block-{block:04d}.safetensors"


def _pruned(
    decoder: Decoder,
    index: int,
    call: Call,
    windows: Iterable[Tensor],
    recipe: Recipe,
    start: Tensors,
    keep: Callable[[Iterable[Tensor]], None] | None = None,
    sums: Path | None = None,
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Prunes every linear of a block, one after the other. All statistics come from the unpruned block.

    Args:
        keep: consumes the outputs of the unpruned block.
        sums: the folder with the sums of weights that blocks share; None: the model has none.
    """
    pruner = pruners.pruner_of(recipe.pruner)
    with decoder.loaded(index, start) as block:
        inputs = gather(decoder, block, windows, call, pruner.NEEDS, keep)
    heap.release_freed_memory()  # of the block and its activations, before the pruner needs memory
    names = complete_names(decoder, index)
    if sums is not None:
        totals = add_uses(decoder, index, inputs, read_sums(sums, index, decoder))
        inputs = {name: totals.pop(stored, inputs[name]) for name, stored in names.items()}
        write_sums(sums, index + 1, totals)
        del totals
    shapes = {name: decoder.blank_linear(index, name).shape for name in names}
    for name in sorted(shapes, key=lambda name: -shapes[name][1]):  # the widest input takes the most memory, so it comes first
        known = inputs.pop(name)  # freed when the last linear that reads it is done
        if not known.silent and not torch.isfinite(known.squares.sum()):
            raise FedgroveError(f"block {index}: the inputs of {name} are not finite", 'try model.dtype = "float32"')
        before = start[name] if name in start else decoder.read_linear(index, name)
        weight = before.to(decoder.device, torch.float32, copy=True).contiguous()
        after, mask = pruners.prune(recipe.pruner, weight, known, recipe.target(index), recipe.damping)
        yield name, before, after.to("cpu", before.dtype), mask.cpu()


def _pass_shared(decoder: Decoder, index: int, call: Call, states: HiddenStates, recipe: Recipe, number: int) -> None:
    """Lets the hidden states pass through a block, and adds its inputs to the sums of the weights that blocks share."""

    def keep(outputs: Iterable[Tensor]) -> None:
        states.write(index + 1, outputs, number)

    needs = pruners.pruner_of(recipe.pruner).NEEDS
    with decoder.loaded(index) as block:
        inputs = gather(decoder, block, states.read(index), call, needs, keep)
    write_sums(states.folder, index + 1, add_uses(decoder, index, inputs, read_sums(states.folder, index, decoder)))


class BlockSums:
    """The server's half: the sums of a block, linear by linear.

    Args:
        layout: the model at the start of the round; block: the block.
        scales: by client, the inverse of the probability that it was assigned the block.
        trim: how many of the highest and of the lowest values are left out at every position.
    """

    def __init__(self, layout: Decoder, block: int, scales: Mapping[str, float], trim: int = 0):
        self._layout, self._block, self._scales = layout, block, scales
        self._requests: dict[str, PruneBlock] = {}
        self.sums: dict[str, WeightedSum] = {
            name: TrimmedSum(trim=trim, before=layout.read_linear(block, name).to(layout.device)) if trim else WeightedSum()
            for name in complete_names(layout, block)
        }

    def masked(self, messages: Mapping[str, Message]) -> dict[str, Message]:
        """See :meth:`fedgrove.rounds.aggregator.base.Accumulator.masked`."""
        units = {name: unit_of(self._layout.read_linear(self._block, name), len(messages)) for name in self.sums}
        code = FixedWeights(units=units, clients=len(messages))
        for client, message in messages.items():
            assert isinstance(message.request, PruneBlock)
            self._requests[client] = message.request.model_copy(update={"fixed_point": code})
        return {client: Message(self._requests[client], message.tensors) for client, message in messages.items()}

    def ring_bits(self) -> int:
        """See :meth:`fedgrove.rounds.aggregator.base.Accumulator.ring_bits`."""
        return VALUE_BITS

    def add(self, client: str, tensors: Tensors, reply: Reply) -> None:
        """Adds one client's block."""
        for name, total in self.sums.items():
            weight, change = tensors.pop(WEIGHT + name), tensors.pop(CHANGE + name, None)
            if weight.dim():
                weight = weight.to(self._layout.device)
            change = None if change is None else change.to(self._layout.device)
            total.add(change, weight if weight.dim() else float(weight), self._scales[client])

    def add_total(self, total: Tensors, replies: Mapping[str, Reply]) -> None:
        """Takes the sum of the clients' fixed-point numbers.

        Raises:
            WireError: clients that followed their requests cannot have this sum: the votes are too many or too few, or a value
                is larger than its votes allow.
        """
        for name in self.sums:
            votes, value = total[WEIGHT + name], total.get(CHANGE + name)
            requests = [self._requests[client] for client in replies]
            code = requests[0].fixed_point
            assert code is not None
            num_kept = sum(votes.numel() - request.recipe.target(self._block).num_pruned(votes.numel()) for request in requests)
            if (
                int(votes.max()) > len(requests)
                or int(votes.long().sum()) != num_kept
                or (value is not None and (value.abs() > code.limit * votes.long()).any())
            ):
                raise WireError(f"block {self._block}, {name}: no valid responses add up to these votes or values")
            device = self._layout.device
            decoded = None if value is None else code.decode(name, value.to(device))
            self.sums[name] = WeightedSum(decoded, votes.to(device).double(), float(len(requests)))

    def take(self, name: str) -> WeightedSum:
        """Returns a linear's sums and removes them, so that their memory can be freed."""
        return self.sums.pop(name)
