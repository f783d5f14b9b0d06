"""Bounds of the weights that a server sends, before a client's text passes through them.

A model of the server's own choice could make what a client then sends reveal its text (Fowl et al., ICLR 2023). So a client
takes only what a stage could have made of its own weights: finite, no larger, zeros stay zeros, and no weight matrix may grow
beyond :data:`GROWTH` times its norm.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedgrove.client.local_client import LocalClient
from fedgrove.client.windows import checkpoint_of
from fedgrove.job.stage_config import Cut
from fedgrove.models.blocks import Decoder
from fedgrove.models.depth import num_blocks
from fedgrove.rounds.request import Tensors

START = "start/"  # tensors of a request: the weights that a round starts from, if they are not those of the client's own copy
GROWTH = 2.0  # the largest norm of a changed tensor, in units of the norm of the client's own
FEW_ZEROS = 0.001  # a linear with a larger fraction of zeros counts as pruned, and its zeros stay


def check_change(name: str, own: Tensor, new: Tensor, client: LocalClient) -> None:
    """Refuses a tensor that no stage makes of the client's own one.

    Args:
        name: of the tensor.
        own: the client's own.
        new: from the server; smaller than the client's own after structured pruning.

    Raises:
        FedgroveError: the tensor is not finite, larger than the client's own, has grown, or has weights where the
            client's own has zeros.
    """
    own, new = own.float(), new.float()
    if new.dim() != own.dim() or any(size > own_size for size, own_size in zip(new.shape, own.shape, strict=True)):
        raise client.error(f"the server sent weights of another shape for {name}; refused")
    check_growth(name, own, new, client)
    zeros = own == 0
    if new.shape == own.shape and float(zeros.float().mean()) > FEW_ZEROS and bool((new[zeros] != 0).any()):
        raise client.error(f"the server sent weights for {name} where its own are zero; refused")


def check_growth(name: str, own: Tensor, new: Tensor, client: LocalClient) -> None:
    """Refuses weights that are not finite, or whose norm grew too much.

    Raises:
        FedgroveError: they are.
    """
    if not float(new.norm()) <= GROWTH * float(own.norm()):  # which NaN is not
        what = f"the server sent weights for {name} that grew more than {GROWTH:g} times; refused"
        raise client.error(f"{what} (if all are honest, lower learning_rate, or raise samples where weights are pruned)")


def check_kept_blocks(kept_blocks: Sequence[int] | None, cut: Cut | None, client: LocalClient) -> None:
    """Refuses a model of another number of blocks than earlier stages leave of the client's own.

    Args:
        kept_blocks: the indexes of the blocks of the client's own copy that the model has; None: all.
        cut: the fractions that earlier stages cut out; None: nothing.

    Raises:
        FedgroveError: it has.
    """
    if kept_blocks is None:
        return
    own = num_blocks(checkpoint_of(client).config)
    left = own - (Cut.whole(cut.depth, own) if cut is not None else 0)
    if len(kept_blocks) != left:
        raise client.error("the request is for a model of another number of blocks than the job leaves; refused")


def start_of(tensors: Tensors, decoder: Decoder, block: int, client: LocalClient) -> Tensors:
    """The weights of a block that were sent with a request, by linear.

    Raises:
        FedgroveError: they are not all linears of the block, or no stage makes such weights of the client's own.
    """
    start = {name.removeprefix(START): weight for name, weight in tensors.items() if name.startswith(START)}
    if start and (block < 0 or start.keys() != decoder.block_names(block).keys()):
        raise client.error(f"the server sent other weights than those of block {block}; refused")
    for name, weight in start.items():
        own = decoder.read_linear(block, name)
        if (weight.shape, weight.dtype) != (own.shape, own.dtype):
            raise client.error(f"the server sent weights of another shape or dtype for {name}; refused")
        check_change(name, own, weight, client)
    return start
