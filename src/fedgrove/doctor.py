"""Checks of a machine, a model and texts before anything runs, with remedies for those that fail.

The functions do not raise for errors of the machine, the model or a text: they return a check that is not ok.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

import torch

from fedgrove.client.completions import Completions
from fedgrove.client.local_client import LocalClient
from fedgrove.data.chat import DATE, Chat, as_text, writes_date
from fedgrove.data.sources import DEFAULT_TEMPLATE, is_hub, read_fields
from fedgrove.data.tally import Tally
from fedgrove.data.tokens import encode, encode_long
from fedgrove.errors import FedgroveError
from fedgrove.job.endpoint import Endpoint
from fedgrove.job.tables import KINDS, Job
from fedgrove.machine import Check, free_disk, free_memory, size_of
from fedgrove.models.blocks import Decoder
from fedgrove.models.preconditions import check_parameters, check_vocabulary, find_equal
from fedgrove.models.shared import as_table
from fedgrove.models.stream import Checkpoint
from fedgrove.rounds.federation import Federation
from fedgrove.run import local_engine, make_plans, open_model
from fedgrove.runfolder import planning_folder
from fedgrove.stages.base import stage_of

SAMPLE, LINES = 400, 6  # characters and lines of the first record that are shown
LENGTH = 512  # tokens of the windows for which "could hold" is computed: the default of a job


def show(checks: Sequence[Check], as_json: bool = False) -> None:
    """Prints checks as text, or as one JSON document."""
    if as_json:
        print(json.dumps([vars(check) for check in checks], indent=2))
        return
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FIX '}  {check.name:<{width}}  {check.text}")
        if check.remedy:
            print(f"{'':{width + 8}}{check.remedy}")
        for line in check.sample.splitlines():
            print(f"{'':{width + 8}}| {line}")


def examine(job: Job, folder: Path) -> list[Check]:
    """Checks what a job needs on this machine: the model, every client's text, disk space for the run, and the plan.

    Args:
        job: the job.
        folder: where runs are written.
    """
    path, details = find(job.model.path, job.model.revision)
    checks = [details]
    dtype = None if job.model.dtype == "auto" else getattr(torch, job.model.dtype)
    readable = False
    if path is not None:
        looked_at = model(path, dtype, job.model.shares)
        readable = all(check.ok for check in looked_at)
        checks += looked_at
    for client in job.clients:
        templates = _templates(client.text, client.prompt, client.answer)
        checks += [check for file in client.data for check in text(client.name, file, templates, path if readable else None)]
    for held_out in job.evaluate.data:
        templates = _templates(held_out.text, held_out.prompt, held_out.answer)
        checks += text(f"held-out {held_out.name}", held_out.path, templates, path if readable else None)
    if path is None or not readable:
        return checks
    if job.model.endpoint:
        checks.append(endpoint(job.model.endpoint, Checkpoint(path)))
    checks.append(_room(job, Checkpoint(path, dtype, shares=job.model.shares), folder))
    if all(check.ok for check in checks):
        checks += _plans(job)
        checks.append(could_hold(path, dtype, shares=job.model.shares))
    return checks


def site(client: LocalClient) -> list[Check]:
    """Checks one client: its copy of the model, its text, and which work fits into its memory.

    ``sample`` of a check is the client's own text and must be removed before checks are sent elsewhere.
    """
    checks = model(client.model, client.dtype, client.shares)
    readable = all(check.ok for check in checks)
    templates = _templates(client.text, client.prompt, client.answer)
    for file in client.data:
        checks += text(client.name, file, templates, client.model if readable else None)
    if readable:
        if client.endpoint:
            checks.append(endpoint(client.endpoint, Checkpoint(client.model)))
        checks.append(could_hold(client.model, client.dtype, client.capabilities.get("memory"), client.shares))
    return checks


def find(path: str, revision: str | None = None) -> tuple[Path | None, Check]:
    """Finds a model. One that is on the hub only is not downloaded: its path is None, and the check gives its size."""
    if Path(path).is_dir():
        return Path(path), Check("model", True, str(path))
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        here = Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (HFValidationError, OSError, ValueError):
        pass
    else:
        return here, Check("model", True, f"{path}, downloaded from the hub to {here}")
    try:
        info = HfApi().model_info(path, revision=revision, files_metadata=True, timeout=10)
    except Exception as error:  # any error of the network or the hub
        return None, Check(
            "model",
            False,
            f"{path} is neither a directory here nor a model available on the hub ({type(error).__name__})",
            "fix model.path; without a network, copy the model here and name its directory",
        )
    size = sum(file.size or 0 for file in info.siblings or [] if file.rfilename.endswith(".safetensors"))
    return None, Check(
        "model", True, f"{path}: on the hub, {size_of(size)} to download; a run downloads it, and then it can be checked"
    )


def model(path: Path, dtype: torch.dtype | None = None, shares: Mapping[str, str] = MappingProxyType({})) -> list[Check]:
    """Checks a model directory: the architecture, every parameter, all weights for NaN and infinity, and the tokenizer.

    Tensors of several blocks that are equal, but are not declared as shared, get a check of their own, which is ok.

    Args:
        shares: see :class:`~fedgrove.models.stream.Checkpoint`.
    """
    try:
        checkpoint = Checkpoint(path, dtype, shares=shares)
        decoder = Decoder(checkpoint)
        notes = check_parameters(decoder)
        equal = find_equal(checkpoint)
        numel = sum(checkpoint.spec(name)[0].numel() for name in checkpoint.names())
        kind = type(decoder.model).__name__
        about = f"{kind}, {numel / 1e6:,.0f} million weights in {len(decoder)} blocks, {size_of(checkpoint.num_bytes())}"
        checks = [Check("model readable", True, "; ".join([about, *notes])), *_equal_tensors(equal, len(decoder))]
    except FedgroveError as error:
        return [_refused("model readable", error)]
    try:
        tokenizer = checkpoint.tokenizer()
        check_vocabulary(tokenizer, decoder)
        words = "A text that every tokenizer can take apart."
        tokens = len(encode(words, tokenizer))
    except FedgroveError as error:
        return [*checks, _refused("tokenizer", error)]
    spoken = "has a chat template" if getattr(tokenizer, "chat_template", None) else "no chat template"
    details = f"{len(tokenizer):,} tokens, {spoken}; {len(words) / max(1, tokens):.1f} characters per token of plain English"
    return [*checks, Check("tokenizer", tokens > 0, details, "" if tokens else "copy the tokenizer's files again")]


def _equal_tensors(equal: Mapping[str, str], num_blocks: int) -> list[Check]:
    """Offers to declare as shared what is equal in several blocks; see :func:`~fedgrove.models.preconditions.find_equal`."""
    if not equal:
        return []
    kinds = len(set(equal.values()))
    said = (
        f"{len(equal) + kinds} tensors of blocks are copies of {kinds}, but are not declared as shared: each would be pruned "
        "and tuned by itself, and they would no longer be equal"
    )
    remedy = "if the blocks share them, add this to the job:"
    return [Check("equal tensors", True, said, remedy, sample=as_table(equal, num_blocks))]


def text(owner: str, file: Path, templates: Mapping[str, str], model: Path | None = None) -> list[Check]:
    """Checks that all records of a file fit the template; ``sample`` shows the first record as the model will see it.

    Args:
        owner: the name of the client, or of the held-out text.
        file: the source.
        templates: see :func:`fedgrove.data.sources.read_fields`.
        model: the model whose tokenizer counts tokens; None: tokens are not counted.
    """
    name = f"{owner}: {file if is_hub(file) else file.name}"
    tally = Tally()
    first: str | None = None
    records = empty = chats = untrainable = characters = tokens = counted = 0
    try:
        tokenizer = Checkpoint(model).tokenizer() if model is not None else None
        for parts in read_fields(file, templates, tally):
            said = [as_text(part, tokenizer) for part in parts]
            joined = "".join(said)
            records += 1
            if isinstance(parts[-1], Chat):
                chats += 1
                untrainable += tokenizer is not None and not parts[-1].trained_spans(tokenizer)
            if not said[-1].strip():
                empty += 1
                continue
            if first is None:
                first = joined
            characters += len(joined)
            if tokenizer is not None and counted < 10**6:  # enough to estimate characters per token
                tokens += sum(map(len, encode_long([joined], tokenizer)))
                counted += len(joined)
    except FedgroveError as error:
        return [_refused(name, error)]
    if first is None:
        return [Check(name, False, f"no text in {records} records", "fix the template, or name another field")]
    details = f"{records:,} records{f' ({chats:,} of them chats)' if chats else ''}, {characters:,} characters"
    if tokens:
        details += f", {'' if counted == characters else 'about '}{round(tokens * characters / counted):,} tokens"
    notes = []
    if tally.files > 1 or tally.passed_over:
        notes.append(f"{tally.files:,} files read, {len(tally.passed_over):,} passed over{_some(tally.passed_over)}")
    if empty:
        notes.append(f"{empty:,} without text are skipped")
    if untrainable:
        notes.append(f"{untrainable:,} chats have no turn of the assistant to train on")
    if tally.replaced:
        notes.append(f"{tally.replaced:,} broken characters (unpaired surrogates) are read as U+FFFD")
    if chats and tokenizer is not None and writes_date(tokenizer):
        notes.append(f"the chat template writes a date: it is always {DATE:%d %b %Y}, so that runs can be repeated")
    notes += tally.guessed
    shown = first[:SAMPLE].splitlines()[:LINES]
    whole = len(first) <= SAMPLE and len(first.splitlines()) <= LINES
    return [Check(name, True, "; ".join([details, *notes]), sample="\n".join(shown) + ("" if whole else "…"))]


def endpoint(at: Endpoint, checkpoint: Checkpoint) -> Check:
    """Checks a completions server by one request, as a stage would ask it; the text that is sent is "Hello".

    Args:
        at: the server.
        checkpoint: the client's own copy of the model, whose tokenizer is used.
    """
    tokenizer = checkpoint.tokenizer()
    ids, host = encode("Hello", tokenizer), urlsplit(at.url).netloc
    began, remedy = time.monotonic(), ""
    try:
        server = Completions(at, "")
        if at.logprobs == "echo":
            server.of_prompt(ids)
            told = "it returns the log-probabilities of a prompt's tokens"
        elif at.logprobs == "next":
            found, wanted = len(server.of_next(ids)), min(at.top, len(tokenizer))
            told = f"it returns {found} of the {wanted} most likely next tokens"
            remedy = (
                "" if found >= wanted else "labels that are not among them all count as the last; choose labels that are likely"
            )
        else:
            server.text_after("Hello", 1)
            told = "it returns text"
    except FedgroveError as error:
        return Check("endpoint", False, f"{host}: {error.what}", error.remedy or "")
    return Check("endpoint", True, f"{host}: {told}; it took {time.monotonic() - began:.2f} s", remedy)


def _some(names: Sequence[str]) -> str:
    """The first few of some names, in brackets."""
    return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""


def could_hold(
    path: Path,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    shares: Mapping[str, str] = MappingProxyType({}),
) -> Check:
    """Which work on a model fits into the memory of this machine, or into a client's limit: estimated, not tried.

    Args:
        path: the model directory.
        dtype: the dtype of the weights; None: as on disk.
        memory: bytes that the planner may use; None: the free memory of the GPU, or of this machine if there is none.
        shares: see :class:`~fedgrove.models.stream.Checkpoint`.
    """
    decoder = Decoder(Checkpoint(path, dtype, shares=shares))
    free = memory or free_memory()
    length = min(LENGTH, getattr(decoder.checkpoint.config.get_text_config(), "max_position_embeddings", LENGTH))
    needs: dict[str, float] = {}
    for kind in KINDS:
        needs |= stage_of(kind).typical_memory(decoder, length)
    fits = [f"{what} ({size_of(need)})" for what, need in needs.items() if need <= free]
    more = [f"{what} ({size_of(need)})" for what, need in needs.items() if need > free]
    said = f"in {size_of(free)}: {', '.join(fits) or 'nothing'}"
    if more:
        said += f"; too large: {', '.join(more)}"
    return Check("could hold", bool(fits), said, "" if fits else "use a smaller model, or a machine with more memory")


def _plans(job: Job) -> list[Check]:
    """Compares each stage's largest memory with this machine's, where one client works at a time."""
    free = free_memory()
    checks = []
    with planning_folder(job) as run:
        try:
            with closing(local_engine(job, run.path / "clients")) as engine:
                plans = make_plans(job, open_model(job.model), Federation(engine, run))
        except FedgroveError as error:
            return [_refused("plan", error)]
    for plan in plans:
        name, most = max(((name, assignment.memory) for name, assignment in plan.clients.items()), key=lambda pair: pair[1])
        said = f"{len(plan.clients)} clients, at most {size_of(most)} of memory ({name}), "
        said += f"{size_of(plan.uploads())} to send in total"
        for client, why in sorted(plan.left_out.items()):
            said += f"; {client} is left out: {why}"
        fits = most <= free
        remedy = "" if fits else f"{size_of(free)} are free here; lower samples or length, or close other programs"
        checks.append(Check(f"stage {plan.stage} ({plan.kind})", fits, said, remedy))
    return checks


def _templates(text: str | None, prompt: str | None = None, answer: str | None = None) -> dict[str, str]:
    return {"prompt": prompt, "answer": answer} if prompt and answer else {"text": text or DEFAULT_TEMPLATE}


def _room(job: Job, checkpoint: Checkpoint, folder: Path) -> Check:
    """Disk space for the run folder: the result, stages' changed tensors, clients' own models, hidden-state caches."""
    width = checkpoint.config.get_text_config().hidden_size
    need = checkpoint.num_bytes()
    num_blocks = checkpoint.config.get_text_config().num_hidden_layers
    for stage in job.stages:
        need += (stage.passes() + len(job.clients) * stage.models_kept()) * checkpoint.num_bytes()
        windows = stage.calibration_windows()
        if windows is not None:
            samples = sum(client.samples or windows[0] for client in job.clients)
            need += stage.hidden_states_kept(num_blocks) * 4 * samples * windows[1] * width
    if job.evaluate.alone:
        need += len(job.clients) * checkpoint.num_bytes()
    if job.evaluate.centralized:
        need *= 2
    free = free_disk(folder)
    said = f"a run needs about {size_of(need)} in {folder.resolve()}, {size_of(free)} are free"
    return Check("room for the run", need <= free, said, "" if need <= free else "free some space, or use another disk (--out)")


def _refused(name: str, error: FedgroveError) -> Check:
    """A failed check from the error with which a run would end."""
    return Check(name, False, str(FedgroveError(error.what, client=error.client)), error.remedy or "")
