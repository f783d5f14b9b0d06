"""A client's text passes through its model block by block, and for each expert its tokens are counted and weighed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedgrove.client.hidden_states import HiddenStates
from fedgrove.models.blocks import Decoder
from fedgrove.models.expert_sums import expert_sums


def sums_of_windows(decoder: Decoder, windows: Tensor, states: HiddenStates) -> Iterator[dict[str, Tensor]]:
    """The sums over each window, block by block, for every block that has experts.

    Args:
        windows: (windows, length) token ids.
        states: where hidden states lie meanwhile; they are gone afterwards.

    Yields:
        (windows, experts) float64 by name; see :func:`~fedgrove.models.expert_sums.expert_sums`.
    """
    calls = decoder.embed(torch.zeros(1, windows.shape[1], dtype=torch.int64))[1]
    states.write(0, (decoder.embed(ids[None])[0] for ids in windows), len(windows))
    decoder.forget_ends()
    try:
        for index in range(len(decoder)):
            with decoder.loaded(index) as block, expert_sums(block) as sums:
                outputs = (decoder.run(block, hidden, calls[index]) for hidden in states.read(index))
                states.write(index + 1, outputs, len(windows))
            states.forget(before=index + 1)
            if sums:
                yield {name: torch.stack([window[name] for window in sums]) for name in sums[0]}
    finally:
        states.forget(before=len(decoder) + 1)
