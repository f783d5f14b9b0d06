"""The hidden states of windows of text, block by block: the weights of one block are in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from fedgrove.events import OnProgress
from fedgrove.models.blocks import Decoder

CHUNK = 65536  # tokens whose hidden states are in memory at once


def walk(
    decoder: Decoder, windows: Sequence[Tensor], blocks: int, on_progress: OnProgress = lambda done, total: None
) -> Iterator[tuple[int, int, Tensor]]:
    """Runs windows through the first blocks of a model, one by one and unpadded.

    Args:
        decoder: the model.
        windows: (1, tokens) token ids each.
        blocks: how many blocks; 0: only the embeddings.
        on_progress: called with (windows done, windows) after every block.

    Yields:
        (number of blocks passed, index of the window, hidden states (1, tokens, width)), for a part of the windows all after
        no block, then all after the first one, and so on.
    """
    start = 0
    while start < len(windows):
        end, tokens = start, 0
        while end < len(windows) and (end == start or tokens + windows[end].numel() <= CHUNK):
            tokens += windows[end].numel()
            end += 1
        part = windows[start:end]
        calls, hidden = {}, []
        for ids in part:
            states, call = decoder.embed(ids)
            calls[ids.shape[1]] = call
            hidden.append(states)
        for passed in range(blocks + 1):
            yield from ((passed, start + i, states) for i, states in enumerate(hidden))
            if passed < blocks:
                with decoder.loaded(passed) as block:
                    for i, ids in enumerate(part):
                        hidden[i] = decoder.run(block, hidden[i], calls[ids.shape[1]][passed])
                on_progress(start + len(part) * (passed + 1) / blocks, len(windows))
        start = end
