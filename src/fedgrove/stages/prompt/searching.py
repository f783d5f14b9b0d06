"""From a job to what a method searches in: the start, the words, and the subspace of soft prompts."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedTokenizerBase

from fedgrove.data.tokens import encode
from fedgrove.errors import FedgroveError
from fedgrove.models.blocks import Decoder
from fedgrove.models.continuations import embed
from fedgrove.stages.prompt.config import MOST_TOKENS, TOKENS, Config
from fedgrove.stages.prompt.methods import Task
from fedgrove.stages.prompt.records import generator_of
from fedgrove.stages.prompt.requests import Subspace
from fedgrove.stages.prompt.subspace import scale_of

_WORD = re.compile(r" [A-Za-z]{2,}")


def task_of(config: Config, index: int, tokenizer: PreTrainedTokenizerBase, seed: str) -> Task:
    """What the method of a stage searches in.

    Args:
        index: of the stage, for errors.
        seed: of the stage.

    Raises:
        FedgroveError: the start does not fit, or there are too few words; names the key.
    """
    start = tuple(encode(config.start, tokenizer)) if config.start else ()
    tokens = config.tokens or len(start) or TOKENS
    most = tokens if config.tokens and (config.searcher.SOFT or config.votes) else MOST_TOKENS
    if len(start) > most:
        raise FedgroveError(
            f"stages.{index}.start: it has {len(start)} tokens, but a prompt has {most} at most",
            "shorten it, or raise tokens",
        )
    words = () if config.searcher.SOFT else _words(config, index, tokenizer, seed)
    return Task(seed, config.population, tokens, config.dimension, start, words, config.learning_rate)


def subspace_of(config: Config, task: Task, decoder: Decoder) -> Subspace | None:
    """The subspace of soft prompts around the start, which is repeated up to the prompt's tokens; its end stays the end.

    Without a start it is around tokens drawn from the vocabulary. None: the method's candidates are token ids.
    """
    if not config.searcher.SOFT:
        return None
    rows = decoder.checkpoint.config.get_text_config().vocab_size
    base = (task.start * task.tokens)[-task.tokens :] if task.start else _random(f"{task.seed}/base", rows, task.tokens)
    every = embed(decoder, torch.arange(rows))
    return Subspace(dimension=task.dimension, scale=scale_of(config.spread, every, task.dimension), base=base)


def _random(seed: str, below: int, number: int) -> tuple[int, ...]:
    return tuple(torch.randperm(below, generator=generator_of(seed))[:number].tolist())


def _words(config: Config, index: int, tokenizer: PreTrainedTokenizerBase, seed: str) -> tuple[tuple[int, ...], ...]:
    """Token ids of the words that a prompt may have, each with a space before it, in the order of the file or drawn."""
    if config.words is not None:
        try:
            lines = [line.strip() for line in config.words.read_text(encoding="utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise FedgroveError(f"{config.words}: not UTF-8 text (byte {error.start})", "convert it") from error
        except OSError as error:
            raise FedgroveError(
                f"stages.{index}.words: {config.words} cannot be read ({error.strerror})", "name a file of words, one a line"
            ) from error
        words = [tuple(encode(f" {line}", tokenizer)) for line in dict.fromkeys(filter(None, lines))]
        if len(words) < 2:
            raise FedgroveError(f"{config.words}: {len(words)} words, but a choice needs two", "add words, one a line")
        return tuple(words[: config.choices])
    words = []
    for token in torch.randperm(len(tokenizer), generator=generator_of(f"{seed}/words")).tolist():
        text = tokenizer.decode([token])
        if _WORD.fullmatch(text) and encode(text, tokenizer) == [token]:
            words.append((token,))
            if len(words) == config.choices:
                break
    if len(words) < 2:
        raise FedgroveError(f"stages.{index}.words: the tokenizer's vocabulary has no words", "give a file of words")
    return tuple(words)
