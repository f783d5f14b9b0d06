"""Does feedback beat random edits of a prompt at equal calls? The clients' half of method "tokens" on a real model.

Clients with posts of four newsgroups edit the prompt " Topic:" (after a line break), each alone, as in one round of a stage.
Three ways to choose the tries: by feedback (as the method does), in the order in which the model proposes, and at random.
Then the server's half: their votes, merged, beside the start and the clients' own prompts on held-out posts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from arguments import existing_folder

from fedgrove.models.blocks import Decoder
from fedgrove.models.stream import Checkpoint
from fedgrove.stages.prompt import editing
from fedgrove.stages.prompt.candidates import as_ids
from fedgrove.stages.prompt.config import Config
from fedgrove.stages.prompt.editing import Arm, Budget, edit
from fedgrove.stages.prompt.lexicon import lexicon_of
from fedgrove.stages.prompt.methods import tokens
from fedgrove.stages.prompt.records import Records, generator_of, read_records
from fedgrove.stages.prompt.requests import prompts_of
from fedgrove.stages.prompt.scoring import costs, right, score, sums
from fedgrove.stages.prompt.searching import task_of

GROUPS = {"sci.space": "space", "rec.sport.hockey": "hockey", "sci.med": "medicine", "rec.autos": "cars"}
LABELS = tuple(f" {label}" for label in GROUPS.values())
START = "\nTopic:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=existing_folder, required=True)
    parser.add_argument("--data", type=existing_folder, required=True)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--records", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=80)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=5)
    parser.add_argument("--population", type=int, default=10)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--score", default="correct")
    parser.add_argument("--ways", nargs="+", default=["feedback", "order", "random"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    decoder = in_memory(Decoder(Checkpoint(args.model), dtype=getattr(torch, args.dtype)))
    config = Config(
        kind="prompt", method="tokens", labels=LABELS, start=START, tokens=args.tokens, population=args.population,
        generations=args.generations, score=args.score, length=args.length,
    )  # fmt: skip
    tokenizer = decoder.checkpoint.tokenizer()
    state = tokens.begin(task_of(config, 0, tokenizer, "0/0"))
    ids, budget = as_ids(state.words), Budget(args.generations, args.population, args.tokens)
    lexicon = lexicon_of(ids, decoder, None)  # type: ignore[arg-type]
    train = posts(args.data / "newsgroups" / "train.jsonl", config, tokenizer, "train", args.clients * args.records)
    held_out = posts(args.data / "newsgroups" / "test.jsonl", config, tokenizer, "test", args.held_out)
    calls = 0
    found: list[tuple[str, int, tuple[int, ...]]] = []

    def scored(prompts: Sequence[Sequence[int]], records: Records) -> list[torch.Tensor]:
        rows = as_ids([[token for word in prompt for token in state.words[word]] for prompt in prompts])
        return score(decoder, records, prompts_of(rows, None, "", decoder), "end")

    for client in range(args.clients):
        own = train.take(range(client, len(train), args.clients))

        def of_client(prompts: Sequence[Sequence[int]], own: Records = own) -> list[float]:
            nonlocal calls
            calls += len(prompts) * len(own)
            total = sums(scored(prompts, own), own, config.score)
            return costs(total.scores, total.records, config.score)

        for way in args.ways:
            began, calls = time.process_time(), 0
            with WAYS[way](len(state.words), client):
                prompt = tuple(edit(state.prompt, lexicon, budget, of_client, generator_of(f"{client}")))
            before, after = of_client([state.prompt, prompt])
            found.append((way, client, prompt))
            said = {"way": way, "client": client, "before": before, "after": after, "calls": calls - 2 * len(own)}
            text = tokenizer.decode([token for word in prompt for token in state.words[word]])
            print(json.dumps({**said, "prompt": text, "seconds": round(time.process_time() - began, 1)}), flush=True)
    for way in args.ways:
        own = [prompt for of, _, prompt in found if of == way]
        offers = tokens.merge(state, *votes_of(own, len(state.words)), lexicon.embeddings).offers
        each = right(scored([*own, *offers], held_out), held_out).double().mean(0).tolist()
        numbers = {"clients": each[: len(own)], "start": each[len(own)], "merged": each[len(own) + 1 :][:1]}
        print(json.dumps({"way": way, "held_out": numbers, "without_a_word": each[len(own) + 2 :]}))


def votes_of(prompts: Sequence[Sequence[int]], words: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of votes and places of clients that came to these prompts."""
    votes, places = torch.zeros(words, dtype=torch.int64), torch.zeros(words, dtype=torch.int64)
    for prompt in prompts:
        distinct = list(dict.fromkeys(prompt))
        votes[distinct] += 1
        places[distinct] += torch.arange(len(distinct))
    return votes, places


def in_memory(decoder: Decoder) -> Decoder:
    """The decoder with all its blocks in memory, so that the seconds are those of computing."""
    decoder.load_all()
    decoder.loaded = lambda index: contextlib.nullcontext(decoder.blocks[index])  # type: ignore[method-assign, assignment]
    return decoder


def posts(file: Path, config: Config, tokenizer: Any, seed: str, number: int) -> Records:
    """That many posts of the four groups."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    kept = [{"text": row["text"], "label": GROUPS[row["label"]]} for row in rows if row["label"] in GROUPS]
    random.Random(seed).shuffle(kept)
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "posts.jsonl"
        chosen.write_text("".join(json.dumps(row) + "\n" for row in kept[:number]), encoding="utf-8")
        return read_records([chosen], "{text}", " {label}", config.labels, tokenizer, config.length)


@contextlib.contextmanager
def by_feedback(words: int, seed: int) -> Iterator[None]:
    """As the method does."""
    yield


@contextlib.contextmanager
def in_order(words: int, seed: int) -> Iterator[None]:
    """What the model proposes, whatever earlier tries gained."""
    with mock.patch.object(editing, "choose", lambda arms, tries, embeddings, number: list(arms[:number])):
        yield


@contextlib.contextmanager
def at_random(words: int, seed: int) -> Iterator[None]:
    """Any word of the list at any place."""
    generator = random.Random(seed)

    def propose(prompt: Sequence[int], expected: Any, embeddings: Any, places: int, _: Any) -> list[Arm]:
        rows = len(prompt) + (len(prompt) < places)
        return [Arm(generator.randrange(rows), generator.randrange(words)) for _ in range(100)]

    with mock.patch.object(editing, "propose", propose), in_order(words, seed):
        yield


WAYS = {"feedback": by_feedback, "order": in_order, "random": at_random}


if __name__ == "__main__":
    main()
