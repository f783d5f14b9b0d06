"""What a client does when it is asked: each handler unpacks, works and packs. Text stays here.

An engine calls :func:`serve`; the kinds of ask are the names in ``HANDLERS``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedgrove import heap, plugins
from fedgrove.stages.prune import pruners
from fedgrove.stages.prune.allocation import Options
from fedgrove.data import DEFAULT_TEMPLATE, calibration_windows, facts_of, training_windows
from fedgrove.errors import FedgroveError
from fedgrove.stages.prune.input_statistics import InputStatistics
from fedgrove.models.masks import Target
from fedgrove.models.blocks import Call, Decoder, as_matrix
from fedgrove.stages.prune.calibration_pass import gather, watching, windows_at_once
from fedgrove.models.perplexity import negative_log_likelihoods
from fedgrove.models.stream import Checkpoint, save_tensors, write_safetensors
from fedgrove.models.width import Width
from fedgrove.stages.structured.gradients import group_products
from fedgrove.privacy.noise import add_noise, once
from fedgrove.privacy.secure import KINDS, SECURE, Credentials, mask_answer, serve_secure
from fedgrove.rounds import wire
from fedgrove.rounds.wire import CHANGE, WEIGHT, Info
from fedgrove.stages.prune.aggregation import to_integers
from fedgrove.stages.structured.scores import fixed_point
from fedgrove.stages.prune.aggregation.pooled import BITS, Statistic
from fedgrove.stages.tune.personal import best, hold_out, keep_best, mean_loss

START = "start/"  # tensors of an ask: the weights that a round starts from, where they are not the client's own copy
SCALE = "scale/"  # tensors of an ask: what the channels of an input are multiplied by before they are summed
WINDOW = "window/"  # tensors of an ask: token ids to evaluate on

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LocalClient:
    """A client's own side: what it has, and where. None of this is ever sent.

    Attributes:
        name: the client's name.
        folder: its own disk, for hidden states between asks.
        model: its copy of the model.
        dtype: read the model in this dtype; None: as it is.
        data: its text files.
        text: how a record becomes text.
        card: what it says of itself.
        credentials: its key and the roster for secure aggregation. A client that has them sends nothing of its text but
            masked, whatever it is asked.
        prompt, answer: instead of ``text`` where a stage tunes: only the answer is learnt.
        owners: instead of ``data``, in a simulation: the clients whose windows this one has; see :mod:`fedgrove.centralized`.
    """

    name: str
    folder: Path
    model: Path
    dtype: torch.dtype | None
    data: tuple[Path, ...]
    text: str | None
    card: Info
    credentials: Credentials | None = None
    prompt: str | None = None
    answer: str | None = None
    owners: tuple[LocalClient, ...] = ()


TEXTLESS = frozenset({"card", "base", *KINDS})  # asks whose answers hold nothing of a client's text


def serve(kind: str, message: bytes, site: LocalClient, device: str) -> bytes:
    """Answers one ask: bytes in, bytes out."""
    tensors, info = wire.unpack(message)
    secure = info.pop(SECURE, None)
    if site.credentials is not None and secure is None and kind not in TEXTLESS:
        raise FedgroveError(f"client '{site.name}': it answers '{kind}' only under secure aggregation")
    release = info.get("release")  # what is noisy is made once
    with torch.no_grad():
        if release is None:
            answer, told = HANDLERS[kind](tensors, info, site, device)
        else:
            answer, told = once(site.folder, release, site.name, lambda: HANDLERS[kind](tensors, info, site, device))
    if secure is not None:
        answer = mask_answer(site, secure, answer, release)
    return wire.pack(answer, told)


def card(tensors: Tensors, info: Info, site: LocalClient, device: str) -> tuple[Tensors, Info]:
    """Says what this client has, after trying whether its text suffices.

    Ask: ``calibrations``, a list of {samples, length, seed}; ``lengths``, of the windows of tuning stages. Answer: the
    fields of :class:`~fedgrove.stages.prune.plan.Capabilities`.
    """
    for wanted in info["calibrations"]:
        _windows(site, **wanted)
    said = dict(site.card)
    for length in info.get("lengths", []):
        said["tokens"] = int(_tokens(_training_windows(site, length)[0]))
    if importlib.util.find_spec("bitsandbytes") is None and "bits" in said:
        said["bits"] = [bits for bits in said["bits"] if bits >= 16]
    if said.get("speed") == "measure":
        said["speed"] = _measured_speed(site, device)
    return {}, said


def prune(tensors: Tensors, info: Info, site: LocalClient, device: str) -> tuple[Tensors, Info]:
    """Prunes one block on this client's text and sends what the aggregation makes of it.

    A client walks through the model once a round: with source ``sequential`` hidden states pass through the blocks that it
    pruned, as it pruned them, and through its own dense copy of the blocks that it was not given; with ``dense`` they pass
    through all blocks as they were, in the run that sums their inputs. They wait on its disk between asks; where they are
    gone, the walk begins anew and comes to the same states.

    Ask:
        block: the block to prune; blocks: all that this client is given in this round.
        stage, round, pruner, aggregation, pattern, source, compute, damping, samples, length, seed: see
            :class:`~fedgrove.job.PruneStage`.
        sparsities: of each block of the model.
        keep: keep the pruned block here, to evaluate what this client would have had alone.
        units, clients: for secure aggregation, see :func:`fedgrove.stages.prune.aggregation.to_integers`; None without.
        tensors ``start/<linear>``: (out, in), what to begin with instead of the dense copy.

    Answer:
        tensors ``change/<linear>`` and ``weight/<linear>``: as the aggregation says; whole numbers where there are ``units``.
        tokens: the number of calibration tokens.
        stage, round, block: of the ask.
    """
    decoder = _decoder(site.model, site.dtype, device, info["compute_dtype"])
    index = int(info["block"])
    states = _States(site, {key: value for key, value in info.items() if key != "block"}, decoder)
    at = states.latest(index)
    together = windows_at_once(info["samples"], info["length"], info["compute_dtype"])
    number = info["samples"] // together
    if at is None:
        texts = _windows(site, info["samples"], info["length"], info["seed"]).view(number, together, -1)
        at = states.write(0, (decoder.embed(ids)[0] for ids in texts), number)
    calls = decoder.calls(together, info["length"])
    decoder.forget_ends()
    dense = info["source"] == "dense"
    more = index < max(info["blocks"])  # after the last block nobody waits for its hidden states

    def keep(outputs: Iterable[Tensor]) -> None:
        states.write(index + 1, outputs, number)

    for passed in range(at, index):
        mine: Tensors = {}
        if passed in info["blocks"]:
            if tensors:  # those of this block are here, those of the blocks before are not
                raise FedgroveError(f"client '{site.name}': its working files are gone; it can take part again next round")
            if not dense:
                found = _pruned(decoder, passed, calls[passed], states.read(passed), info, {})
                mine = {name: after for name, _, after, _ in found}
        with _loaded(decoder, passed, mine) as block:
            states.write(passed + 1, (decoder.run(block, h, calls[passed]) for h in states.read(passed)), number)

    aggregation = plugins.load("stages.prune.aggregation", info["aggregation"])
    tokens = info["samples"] * info["length"]
    start = _start(tensors)
    answer: Tensors = {}
    own: Tensors = {}
    found = _pruned(decoder, index, calls[index], states.read(index), info, start, keep if dense and more else None)
    for name, before, after, mask in found:
        change, weight = aggregation.weigh(before, after, mask, tokens)
        if info.get("units"):
            change, weight = to_integers(change, weight, info["units"][name], info["clients"])
        if change is not None:
            answer[CHANGE + name] = change
        answer[WEIGHT + name] = weight if isinstance(weight, Tensor) else torch.tensor(weight, dtype=torch.float64)
        if info["keep"] or (more and not dense):
            own[name] = after
        del before, after, mask  # the next ones come before these would go
    if more and not dense:
        with _loaded(decoder, index, own) as block:
            keep(decoder.run(block, h, calls[index]) for h in states.read(index))
    states.forget(before=at)
    if info["keep"]:
        names = decoder.block_names(index)
        stored = {names[name]: as_matrix(decoder.blocks[index].get_submodule(name), after) for name, after in own.items()}
        save_tensors(stored, _alone(site, index))
    return answer, {"tokens": tokens, **{key: info[key] for key in ("stage", "round", "block")}}


def statistics(tensors: Tensors, info: Info, site: LocalClient, device: str) -> tuple[Tensors, Info]:
    """WeightedSum what the server's pruner needs to know of one block's inputs, over this client's text.

    With source ``dense`` hidden states pass through this client's own copy of the model: where working files are gone the
    walk begins anew, so a client may miss any ask. With ``sequential`` they pass through the pruned blocks that the server
    made, which come with each ask: a client whose states are gone cannot go on.

    Ask:
        block: whose inputs are summed. stage, samples, length, seed, source, compute: see :class:`~fedgrove.job.PruneStage`.
        run: any string; hidden states of another run are not used.
        readers: for each linear of the block the input that it reads.
        products: the inputs whose products are wanted, not just their squares. moments: whether sums and variances are.
        limit: the largest number that may be sent.
        noise: None, or {norms: by input, inputs, clients, epsilon, delta}: see :func:`fedgrove.privacy.noise.add_noise`;
        release: with noise, a name for what is released, see :func:`fedgrove.privacy.noise.once`.
        tensors ``scale/<input>``: (in,) float32 powers of two.
        tensors ``start/<linear>``: (out, in), the block before this one, pruned; only with ``sequential``.

    Answer:
        tensors ``change/<input>/squares`` and ``/products``, ``/sums``, ``/spreads``: see
            :class:`~fedgrove.stages.prune.aggregation.pooled.Statistic`.
        stage, block: of the ask. tokens: the number of calibration tokens.
    """
    decoder = _decoder(site.model, site.dtype, device, info["compute_dtype"])
    index, samples = int(info["block"]), int(info["samples"])
    walk = {key: info[key] for key in ("run", "stage", "samples", "length", "seed", "source", "compute_dtype")}
    states = _States(site, walk, decoder)
    calls = decoder.embed(torch.zeros(1, info["length"], dtype=torch.int64))[1]
    start = _start(tensors)
    at = states.latest(index - 1 if start else index)
    if at is None and (index <= 1 or not start):
        windows = _windows(site, samples, info["length"], info["seed"])
        at = states.write(0, (decoder.embed(ids[None])[0] for ids in windows), samples)
    if at is None or (start and at != index - 1):
        raise FedgroveError(f"client '{site.name}': its working files are gone; it can take part again with source = \"dense\"")
    for passed in range(at, index):
        with _loaded(decoder, passed, start) as block:
            states.write(passed + 1, (decoder.run(block, h, calls[passed]) for h in states.read(passed)), samples)

    readers: dict[str, str] = info["readers"]
    limit = int(info["limit"])
    noise = info["noise"]
    if noise:
        if info["products"] or info["moments"]:
            raise FedgroveError(f"client '{site.name}': there is noise for squares alone; it sends nothing else beside it")
        if not info.get("release"):
            raise FedgroveError(f"client '{site.name}': noisy sums without a name could be asked for again and again")

    def begin(name: str) -> Statistic:
        if readers.get(name) != name:
            raise FedgroveError(f"client '{site.name}': its model reads the inputs of {name} in another way than the server's")
        scale = tensors[SCALE + name].to(decoder.device)
        norm = noise["norms"][name] if noise else None
        return Statistic(name, scale, name in info["products"], limit, norm, bool(info["moments"]))

    with decoder.loaded(index) as block, watching(block, begin) as inputs:
        if info["source"] == "dense" and index < len(decoder) - 1:
            states.write(index + 1, (decoder.run(block, h, calls[index]) for h in states.read(index)), samples)
        else:
            for h in states.read(index):
                decoder.run(block, h, calls[index])
    states.forget(before=index - 1)
    answer: Tensors = {}
    for first in sorted(set(readers.values())):
        statistic = inputs[first]
        if noise:
            shared = {key: noise[key] for key in ("inputs", "clients", "epsilon", "delta")}
            statistic.squares = add_noise(statistic.squares, noise["norms"][first], **shared, bits=BITS)
        answer |= statistic.answer()
    return answer, {"stage": info["stage"], "block": index, "tokens": samples * info["length"]}


def allocate(tensors: Tensors, info: Info, site: LocalClient, device: str) -> tuple[Tensors, Info]:
    """Measures every block of this client's copy of the model, to say how much of it may go.

    Ask: ``stage``; ``allocation``, ``owl_m``, ``owl_lambda``, ``compute``, ``samples``, ``length``, ``seed``: see
    :class:`~fedgrove.job.PruneStage`.
    Answer: tensor ``change/measured``: (blocks,) int64, the measure times 2³² times the number of windows; stage, of the ask.
    """
    method = plugins.load("stages.prune.allocation", info["allocation"])
    decoder = _decoder(site.model, site.dtype, device, info["compute_dtype"])
    states = _States(site, info, decoder)
    windows = _windows(site, info["samples"], info["length"], info["seed"])
    calls = decoder.embed(torch.zeros(1, info["length"], dtype=torch.int64))[1]
    states.write(0, (decoder.embed(ids[None])[0] for ids in windows), len(windows))
    options = Options(info["owl_m"], info["owl_lambda"])
    measured = []
    for index in range(len(decoder)):
        with decoder.loaded(index) as block, watching(block, lambda name: InputStatistics(method.NEEDS)) as inputs:
            states.write(index + 1, (decoder.run(block, h, calls[index]) for h in states.read(index)), len(windows))
        weights = {name: decoder.read_linear(index, name).to(decoder.device) for name in decoder.block_names(index)}
        measured.append(method.measure(weights, inputs, options))
        states.forget(before=index + 1)
    whole = [round(value * 2**32) * len(windows) for value in measured]
    return {CHANGE + "measured": torch.tensor(whole, dtype=torch.int64)}, {"stage": info["stage"]}


def narrow(tensors: Tensors, info: Info, site: LocalClient, device: str) -> tuple[Tensors, Info]:
    """WeightedSum what the loss on this client's text would change, were a channel or a group of heads cut; all of them at once.

    Ask: ``stage``; ``score``, ``samples``, ``length``, ``seed``: see :class:`~fedgrove.job.StructuredStage`; ``limit``: the largest
    number that may be sent.
    Answer: tensors ``change/<block>/channels`` and ``change/<block>/heads``: (groups,) int64, see :mod:`fedgrove.stages.structured.scores`;
    stage, of the ask; tokens: the number of calibration tokens.
    """
    aggregation = plugins.load("stages.structured.scores", info["score"])
    decoder = _decoder(site.model, site.dtype, device)
    windows = _windows(site, info["samples"], info["length"], info["seed"])
    states = _States(site, info, decoder)
    answer: Tensors = {}
    try:
        for index, found in group_products(decoder, windows, states):
            for kind, products in found.items():
                answer[f"{CHANGE}{index}/{kind}"] = fixed_point(aggregation.weigh(products), int(info["limit"]))
    except FedgroveError as fault:
        raise FedgroveError(f"client '{site.name}': {fault}") from fault
    finally:
        states.forget(before=len(decoder) + 1)  # half of them are gradients by now: no walk may begin with them
    return answer, {"stage": info["stage"], "tokens": windows.numel()}


def evaluate(tensors: Tensors, info: Info, site: LocalClient, device: str) -> tuple[Tensors, Info]:
    """Measures what this client would have had alone, on text that the server sends.

    Ask: ``texts``: {name: number of windows}; tensors ``window/<name>/<i>``: (1, tokens) token ids; ``walk``: the JSON of the
    asks ``prune`` of round one, for blocks that were lost with the client's working files and have to be pruned again.
    Answer: of each window, (windows,) float64: tensors ``change/<name>`` = negative log-likelihood, ``weight/<name>`` = number
    of predicted tokens.
    """
    for index in range(len(_decoder(site.model, site.dtype, device))):
        if not _alone(site, index).is_file():
            prune({}, {**info["walk"], "block": index, "aggregation": "fedspallm"}, site, device)  # alone, no aggregation has a say
    decoder = Decoder(Checkpoint(site.model, site.dtype).over(_alone(site, 0).parent), device)
    answer: Tensors = {}
    for name, number in info["texts"].items():
        windows = [tensors[f"{WINDOW}{name}/{i}"].long() for i in range(number)]
        each = torch.tensor(negative_log_likelihoods(decoder, windows), dtype=torch.float64)
        answer[CHANGE + name], answer[WEIGHT + name] = each[:, 0].contiguous(), each[:, 1].contiguous()
    return answer, {}


def base(tensors: Tensors, info: Info, site: LocalClient, device: str) -> tuple[Tensors, Info]:
    """Keeps what the model of a tuning stage has that this client's own copy has not: what earlier stages changed.

    Ask: ``stage``; ``part``: a number; tensors by their name in the checkpoint.
    """
    save_tensors(tensors, _base(site, info["stage"]) / f"part-{info['part']:05d}.safetensors")
    return {}, {}


def importance(tensors: Tensors, info: Info, site: LocalClient, device: str) -> tuple[Tensors, Info]:
    """Scores every linear on this client's text, in a few steps of training that are then forgotten.

    Ask: ``stage``, ``parts`` (see :func:`base`), ``width`` (of the blocks, where they are narrower than this client's copy),
    ``bits``, ``length``, ``seed``, ``settings``; ``whole``, as for :func:`train`.
    Answer: tensor ``change/importance``: (linears,) float64, in the model's order; ``weight/tokens``. With ``whole`` int32, of
    scores that add up to one.
    """
    from fedgrove.stages.tune import importance as scoring
    from fedgrove.stages.tune.lora import Settings, draw, load

    decoder, ids, labels = _to_tune(site, info, device)
    tokens = _tokens(ids)
    (ids, labels), _ = hold_out(ids, labels, info["personal"])
    shapes = {name: decoder.read_shape(name) for name in decoder.linear_names()}
    settings = Settings(**info["settings"])
    batches = draw(ids, labels, settings.batch, 0, f"{info['seed']}/{site.name}/importance")
    scores = scoring.importance(load(decoder, info["bits"]), shapes, batches, settings, info["seed"])
    if info.get("whole"):
        from fedgrove.stages.tune import fixed_point as whole

        shares = torch.tensor(list(scoring.shares(scores, list(shapes)).values()), dtype=torch.float64)
        return whole.encode({"importance": shares}, info["whole"]["share"]), {}
    return {CHANGE + "importance": scores, WEIGHT + "tokens": tokens}, {}


def train(tensors: Tensors, info: Info, site: LocalClient, device: str) -> tuple[Tensors, Info]:
    """Trains adapters, or whole linears, on this client's text for one round.

    Ask:
        stage, parts, width, bits, length, seed, settings: likewise; personal: the share of windows to hold out; round.
        seen: windows that this client was given in earlier rounds.
        ranks: by linear; null: whole linears. scales: by linear. masked: the linears whose zeros stay zero.
        trains: "ab" or "b"; precision: dtype of the answer.
        whole: None, or {share, ranks, noise}: the answer in whole numbers, see :mod:`fedgrove.stages.tune.fixed_point`.
        private: None, or {epsilon, delta, noise, rounds, bound}: DP-SGD, see :func:`fedgrove.stages.tune.trainers.dp_sgd.train`.
        release: where there is noise, a name that ends in /stage/round, see :func:`fedgrove.privacy.noise.once`.
        tensors ``own/<linear>/b``, ``own/<linear>/a``, ``rest/<linear>/b``, …: where to start; a missing factor begins anew.
        With whole linears ``own/<linear>``: the change so far.

    Answer:
        tensors ``change/<linear>/b`` and ``/a``: the adapter as trained (a whole linear's: ``change/<linear>``, what this round
        added); ``weight/tokens``; metrics: loss, the mean of the round. With ``whole`` int32 ``change/<linear>/b``, what this
        round changed, and ``change/loss``. No loss leaves where there is noise.
    """
    from fedgrove.stages.tune.aggregation import Start
    from fedgrove.stages.tune import lora
    from fedgrove.stages.tune.factors import Factors, fill, initial_a

    decoder, ids, labels = _to_tune(site, info, device)
    tokens = _tokens(ids)
    (ids, labels), held = hold_out(ids, labels, info["personal"])
    settings = lora.Settings(**info["settings"])
    whole, private = info.get("whole"), info.get("private")
    noise = private or (whole and whole["noise"])
    if noise and not str(info.get("release")).endswith(f"/{info['stage']}/{info['round']}"):
        raise FedgroveError(f"client '{site.name}': a noisy answer that is not named by its round could be asked for anew")
    if noise and not info["round"] < noise["rounds"]:
        raise FedgroveError(f"client '{site.name}': round {info['round'] + 1} of {noise['rounds']}: its budget is spent")

    def learn(model: nn.Module, masks: Mapping[str, Tensor] = MappingProxyType({})) -> Info:
        batches = lora.draw(ids, labels, settings.batch, info["seen"], f"{info['seed']}/{site.name}")
        if private:
            from fedgrove.stages.tune.trainers.dp_sgd import train

            train(model, ids, labels, settings, client=site.name, **private)
            return {}
        return {"loss": _train(site, model, batches, settings, masks)}

    shapes = {name: decoder.read_shape(name) for name in decoder.linear_names()}
    masks = {name: decoder.read_matrix(name) != 0 for name in info["masked"]}
    model = lora.load(decoder, info["bits"])
    dtype = getattr(torch, info["precision"])
    answer: Tensors = {WEIGHT + "tokens": tokens}

    def given(kind: str, name: str) -> Factors:
        num_out, num_in = shapes[name]
        b = tensors.get(f"{kind}/{name}/b", torch.zeros(num_out, 0)).float()
        a = tensors.get(f"{kind}/{name}/a")
        if a is None:  # all share one A: the rows of the rest come after those of what is trained
            first = tensors[f"own/{name}/b"].shape[1] if kind == "rest" and f"own/{name}/b" in tensors else 0
            a = initial_a(name, first + b.shape[1], num_in, info["seed"])[first:]
        return Factors(b, a.float())

    if info["ranks"] is None:
        before = {}
        for name in shapes:
            weight = cast(nn.Parameter, model.get_submodule(name).weight)
            if f"own/{name}" in tensors:
                weight.data += as_matrix(model.get_submodule(name), tensors[f"own/{name}"]).to(weight.device, weight.dtype)
            before[name] = weight.detach().clone()
        lora.open_weights(model, list(shapes))
        told = learn(model, masks)
        for name, start in before.items():
            module = model.get_submodule(name)
            change = cast(Tensor, module.weight).detach() - start
            answer[CHANGE + name] = as_matrix(module, change).to("cpu", dtype).contiguous()
        return answer, told

    ranks: dict[str, int] = info["ranks"]
    starts = {
        name: Start(fill(given("own", name), ranks.get(name, 0), name, info["seed"]), given("rest", name)) for name in shapes
    }
    lora.attach(model, starts, info["scales"], masks)
    if info["trains"] == "b":
        lora.hold_a(model)
    told = learn(model)
    trained = lora.detach(model, list(ranks))
    if held:
        changes = {name: trained[name].plus(start.rest) if name in trained else start.rest for name, start in starts.items()}
        keep_best(_best(site, info["stage"]), mean_loss(model, held, settings.micro), changes, begin=info["round"] == 0)
    if whole:
        return _whole(site, {name: trained[name].b - starts[name].own.b for name in ranks}, shapes, whole, told), {}
    for name, factors in trained.items():
        answer[f"{CHANGE}{name}/b"] = factors.b.to(dtype)
        if "a" in info["trains"]:
            answer[f"{CHANGE}{name}/a"] = factors.a.to(dtype)
    return answer, told


def personal(tensors: Tensors, info: Info, site: LocalClient, device: str) -> tuple[Tensors, Info]:
    """Compares the shared adapter with this client's own best one, on its own held-out text, and keeps what is better.

    Ask: ``stage``, ``parts``, ``width``, ``bits``, ``length``, ``seed``, ``personal``, ``masked``: as of ``train``; ``micro``;
    ``base`` and ``title``, for the card of what is kept; tensors ``rest/<linear>/b`` and ``/a``: the shared adapter.

    Answer: ``shared`` and ``own``, mean losses of a learnt token; null where there was too little text to hold some out. An
    own adapter that is better lies in ``personal/stage-N`` of this client's folder; it is never sent.
    """
    from fedgrove.stages.tune.aggregation import Start
    from fedgrove.stages.tune import lora
    from fedgrove.stages.tune.peft_adapter import write_adapter
    from fedgrove.stages.tune.factors import Factors

    decoder, ids, labels = _to_tune(site, info, device)
    _, held = hold_out(ids, labels, info["personal"])
    kept = best(_best(site, info["stage"]))
    if held is None or kept is None:
        return {}, {"shared": None, "own": None}
    own, changes = kept
    masks = {name: decoder.read_matrix(name) != 0 for name in info["masked"]}
    model = lora.load(decoder, info["bits"])
    names = {key.split("/")[1] for key in tensors}
    starts = {n: Start(Factors(tensors[f"rest/{n}/b"][:, :0], tensors[f"rest/{n}/a"][:0]),
                       Factors(tensors[f"rest/{n}/b"], tensors[f"rest/{n}/a"])) for n in sorted(names)}  # fmt: skip
    lora.attach(model, starts, {}, masks)
    shared = mean_loss(model, held, int(info["micro"]))
    out = site.folder / "personal" / f"stage-{int(info['stage'])}"
    if own < shared:
        plain = Decoder(Checkpoint(site.model, site.dtype))
        write_adapter(out, plain, changes, info["base"], info["title"], pruned=bool(masks), changed=info["parts"] > 0)
    else:
        shutil.rmtree(out, ignore_errors=True)
    return {}, {"shared": shared, "own": own}


HANDLERS: dict[str, Callable[[Tensors, Info, LocalClient, str], tuple[Tensors, Info]]] = {
    "card": card,
    "prune": prune,
    "pooled": statistics,
    "allocate": allocate,
    "structured": narrow,
    "evaluate": evaluate,
    **{kind: serve_secure(kind) for kind in KINDS},
    "base": base,
    "importance": importance,
    "train": train,
    "personal": personal,
}


def _pruned(
    decoder: Decoder,
    index: int,
    call: Call,
    windows: Iterable[Tensor],
    info: Info,
    start: Tensors,
    keep: Callable[[Iterable[Tensor]], None] | None = None,
) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Prunes every linear of a block, one after the other, all on the inputs that the unpruned block gives them.

    Args:
        start: (out, in) by linear: what to begin with instead of what the checkpoint has.
        keep: takes what leaves the unpruned block.

    Yields:
        (linear, before, after, mask): the weights in the checkpoint's dtype, all three (out, in) on the CPU.
    """
    pruner = plugins.load("stages.prune.pruners", info["pruner"])
    target = Target(info["sparsities"][index], tuple(info["pattern"]) if info["pattern"] else None)
    with _loaded(decoder, index, start) as block:
        inputs = gather(decoder, block, windows, call, pruner.NEEDS, keep)
    heap.release_freed_memory()  # what the block and its run took: solving begins without
    shapes = {name: decoder.blank_linear(index, name).shape for name in decoder.block_names(index)}
    for name in sorted(shapes, key=lambda name: -shapes[name][1]):  # what takes most memory comes while there is no answer yet
        known = inputs.pop(name)  # let go when the last linear that reads it is done
        if not known.silent and not torch.isfinite(known.squares.sum()):
            raise FedgroveError(f'block {index}: the inputs of {name} are not finite; try model.dtype = "float32"')
        before = start[name] if name in start else decoder.read_linear(index, name)
        weight = before.to(decoder.device, torch.float32, copy=True).contiguous()
        after, mask = pruners.prune(info["pruner"], weight, known, target, info["damping"])
        yield name, before, after.to("cpu", before.dtype), mask.cpu()


def _start(tensors: Tensors) -> Tensors:
    """By linear, the weights that an ask brings."""
    return {name.removeprefix(START): weight for name, weight in tensors.items() if name.startswith(START)}


@contextmanager
def _loaded(decoder: Decoder, index: int, weights: Tensors) -> Iterator[nn.Module]:
    """A block with these linears, (out, in), in the place of its own."""
    with decoder.loaded(index) as block:
        for name, weight in weights.items():
            module = block.get_submodule(name)
            like = cast(nn.Parameter, module.weight)
            module.weight = nn.Parameter(as_matrix(module, weight).to(like.device, like.dtype), requires_grad=False)
        yield block


def _windows(site: LocalClient, samples: int, length: int, seed: str) -> Tensor:
    if site.owners:
        wanted = [owner.card.get("samples") for owner in site.owners]
        each = (samples - sum(filter(None, wanted))) // max(1, wanted.count(None))
        windows = [_windows(owner, own or each, length, seed) for owner, own in zip(site.owners, wanted, strict=True)]
        return torch.cat(windows)
    seed = f"{seed}/{site.name}"

    def cut() -> Tensors:
        return {"ids": calibration_windows(site.data, site.text, _tokenizer(site.model), samples, length, seed)}

    return _kept(site, [site.text, samples, length, seed], cut)["ids"].long()


def _to_tune(site: LocalClient, info: Info, device: str) -> tuple[Decoder, Tensor, Tensor]:
    """The model of a tuning stage with nothing in it yet, and this client's windows."""
    folder = _base(site, info["stage"])
    parts = len(list(folder.glob("part-*.safetensors")))
    if parts < info["parts"]:
        raise FedgroveError(f"client '{site.name}': its working files are gone; continue the run with --resume")
    width = Width(**info["width"]) if info["width"] else None
    checkpoint = Checkpoint(site.model, site.dtype, [folder] if info["parts"] else [], width)
    return Decoder(checkpoint, device), *_training_windows(site, info["length"])


def _train(
    site: LocalClient,
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    settings: Any,
    masks: Mapping[str, Tensor] = MappingProxyType({}),
) -> float:
    from fedgrove.stages.tune.lora import train

    try:
        return train(model, batches, settings, masks, other_devices(site, next(model.parameters()).device))
    except FedgroveError as fault:
        raise FedgroveError(f"client '{site.name}': {fault}") from fault


def other_devices(site: LocalClient, first: torch.device) -> list[torch.device]:
    """The devices after the first that this client's card promises. On a CPU one copy of the model uses all cores."""
    number = int(site.card.get("devices", 1))
    if first.type == "cpu":
        return []
    start, there = first.index or 0, torch.get_device_module(first).device_count()
    if start + number > there:
        raise FedgroveError(f"devices = {number}, but from {first} on there are {there - start}; mend clients.devices")
    return [torch.device(first.type, start + i) for i in range(1, number)]


def _whole(site: LocalClient, changes: Tensors, shapes: dict[str, tuple[int, int]], wanted: Info, told: Info) -> dict[str, Tensor]:
    """What a round changed, as whole numbers: clipped and noisy if a client is to be protected, else with the loss."""
    from fedgrove.privacy import tuning as dp
    from fedgrove.stages.tune import fixed_point as whole

    noise = wanted["noise"]
    if noise:
        changes = dp.clipped(changes, noise["bound"])
    values = {}
    for name, widest in wanted["ranks"].items():
        change = changes.get(name)
        values[f"{name}/b"] = whole.padded(torch.zeros(shapes[name][0], 0) if change is None else change, widest)
    if told and not noise:
        values[whole.LOSS] = torch.tensor([min(told["loss"], whole.LARGEST - 1.0)])
    try:
        answer = whole.encode(values, wanted["share"])
    except FedgroveError as fault:
        raise FedgroveError(f"client '{site.name}': {fault}") from fault
    if not noise or not noise["adders"]:
        return answer
    sigma = dp.client_noise(noise["epsilon"], noise["delta"], noise["rounds"]) * noise["bound"] * wanted["share"]
    return dp.add_whole(answer, sigma * 2.0**whole.BITS / math.sqrt(noise["adders"]))


def _tokens(ids: Tensor) -> Tensor:
    return torch.tensor(ids.numel(), dtype=torch.float64)


def _training_windows(site: LocalClient, length: int) -> tuple[Tensor, Tensor]:
    """All windows of this client's text, tokenised once and kept on its own disk."""
    if site.owners:
        owned = [_training_windows(owner, length) for owner in site.owners]
        return torch.cat([ids for ids, _ in owned]), torch.cat([labels for _, labels in owned])
    templates = {"text": site.text or DEFAULT_TEMPLATE}
    if site.prompt and site.answer:
        templates = {"prompt": site.prompt, "answer": site.answer}

    def cut() -> Tensors:
        ids, labels = training_windows(site.data, templates, _tokenizer(site.model), length)
        return {"ids": ids, "labels": labels}

    windows = _kept(site, [templates, length], cut)
    return windows["ids"].long(), windows["labels"].long()


def _kept(site: LocalClient, settings: list[Any], cut: Callable[[], Tensors]) -> Tensors:
    """Windows of this client's text, cut once and kept on its own disk as int32."""
    try:
        files = [facts_of(path) for path in site.data]
        facts = json.dumps([files, settings, _checkpoint(site.model, site.dtype).fingerprint()], sort_keys=True)
        file = site.folder / f"windows-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.safetensors"
        if not file.is_file():
            save_tensors({name: windows.int() for name, windows in cut().items()}, file)
    except FedgroveError as fault:
        raise FedgroveError(f"client '{site.name}': {fault}") from fault
    windows: Tensors = load_file(file)
    return windows


def _measured_speed(site: LocalClient, device: str) -> float:
    """Relative to ``SPEED``: how fast this client goes forwards and back through one block. Kept, so that a plan stays."""
    file = site.folder / "speed.json"
    if not file.is_file():
        from fedgrove.client.speed import block_speed

        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(block_speed(Decoder(_checkpoint(site.model, site.dtype), device))), encoding="utf-8")
    return float(json.loads(file.read_text(encoding="utf-8")))


def _best(site: LocalClient, stage: int) -> Path:
    return site.folder / f"best-{int(stage)}"


def _base(site: LocalClient, stage: int) -> Path:
    return site.folder / f"base-{int(stage)}"


def _alone(site: LocalClient, block: int) -> Path:
    return site.folder / "alone" / f"block-{block:04d}.safetensors"


@lru_cache(maxsize=1)
def _checkpoint(model: Path, dtype: torch.dtype | None) -> Checkpoint:
    return Checkpoint(model, dtype)


@lru_cache(maxsize=1)
def _tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return Checkpoint(model).tokenizer()


@lru_cache(maxsize=1)
def _decoder(model: Path, dtype: torch.dtype | None, device: str, compute: str | None = None) -> Decoder:
    return Decoder(_checkpoint(model, dtype), device, getattr(torch, compute) if compute else None)


class _States:
    """The hidden states that enter a block, for all calibration windows: on the client's disk, one window in memory.

    Those of the newest block and of the one before it are kept, so that an ask that comes again is answered again.
    """

    def __init__(self, site: LocalClient, walk: Info, decoder: Decoder):
        files = [facts_of(path) for path in site.data]
        facts = [walk, files, site.text, decoder.checkpoint.fingerprint(), str(decoder.device)]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = site.folder / f"walk-{key}"
        self.device = decoder.device
        self.folder.mkdir(parents=True, exist_ok=True)
        for other in site.folder.glob("walk-*"):
            if other != self.folder:
                for file in other.iterdir():
                    file.unlink()
                other.rmdir()

    def latest(self, index: int) -> int | None:
        """The last block up to ``index`` whose inputs are here."""
        return max((i for i in self._kept() if i <= index), default=None)

    def write(self, index: int, windows: Iterable[Tensor], number: int) -> int:
        """Keeps the states that enter block ``index``; they are there whole or not at all."""
        beside = self._file(index).with_suffix(".partial")
        iterator = iter(windows)
        first = next(iterator)
        specs = {str(i): (first.shape, first.dtype) for i in range(number)}

        def all_windows() -> Iterator[Tensor]:
            yield first.cpu()
            for window in iterator:
                yield window.cpu()

        write_safetensors(beside, specs, all_windows())
        beside.replace(self._file(index))
        return index

    def read(self, index: int) -> Iterator[Tensor]:
        """Window by window, in order."""
        with safe_open(self._file(index), framework="pt") as file:
            number = len(list(file.keys()))
        for i in range(number):
            with safe_open(self._file(index), framework="pt", device=str(self.device)) as file:  # pages stay while it is open
                window = file.get_tensor(str(i))
            yield window

    def forget(self, before: int) -> None:
        """Lets go of the states that no ask can need again."""
        for index in self._kept():
            if index < before:
                self._file(index).unlink()

    def _kept(self) -> list[int]:
        return [int(path.stem) for path in self.folder.glob("*.safetensors")]

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:04d}.safetensors"
