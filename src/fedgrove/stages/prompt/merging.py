"""One prompt from votes for words: attention says which words to take, density which of them say the same.

After FedDTPT (arXiv 2411.00985): a word's weight is its similarity to all that was voted for, words of similar meaning are
clusters of DBSCAN, of each cluster the word of the largest weight stays, and the words are put in the order of their places.
There the server has every client's list; here it needs the sums of votes and of places only. What differs: a word's weight
counts all other votes, also those of the same client, and is not rescaled within each client's prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NOISE = -1  # the cluster of a point that is in none
LEAST = 2  # points that are near each other make a cluster, and votes that a word outside of all clusters needs


def merge_votes(votes: Tensor, places: Tensor, embeddings: Tensor, most: int) -> list[int]:
    """The merged prompt.

    Args:
        votes: (words,) integers, how many clients have a word in their prompt.
        places: (words,) integers, the sum of its places there.
        embeddings: (words, width).
        most: words that a prompt can have; of more, those of the largest weights stay.

    Returns:
        Indices of words in the order of their mean places; none, if no word belongs to a cluster and none has two votes.
    """
    voted = votes.nonzero().flatten()
    if not len(voted):
        return []
    counts = votes[voted].double()
    similar = cosines(embeddings[voted])
    weight = attention(counts, similar)
    distances = (1 - similar).clamp(min=0.0).fill_diagonal_(0.0)
    clusters = dbscan(distances, elbow(distances), LEAST)
    order = sorted(range(len(voted)), key=lambda i: (-float(weight[i]), i))
    taken: list[int] = []
    represented: set[int] = set()
    for i in order:
        if (clusters[i] == NOISE and counts[i] < LEAST) or clusters[i] in represented:
            continue
        represented |= {clusters[i]} - {NOISE}
        taken.append(i)
    mean = places[voted].double() / counts
    return [int(voted[i]) for i in sorted(taken[:most], key=lambda i: (float(mean[i]), i))]


def attention(counts: Tensor, similar: Tensor) -> Tensor:
    """The weight of each word: w_v = Σ_v' n_v'·cos(v, v') − 1, the sum over all votes but one for itself.

    Args:
        counts: (words,) float64, n.
        similar: (words, words) float64, cosines.
    """
    return similar @ counts - 1


def cosines(embeddings: Tensor, others: Tensor | None = None) -> Tensor:
    """Cosines between rows, (rows, rows of ``others``) float64; without ``others`` symmetric to the last bit."""
    rows = torch.nn.functional.normalize(embeddings.double(), dim=1)
    if others is not None:
        return rows @ torch.nn.functional.normalize(others.double(), dim=1).T
    product = rows @ rows.T
    return (product + product.T) / 2


def elbow(distances: Tensor) -> float:
    """The distance up to which points are near: where the sorted distances to the nearest other point bend the most.

    That is the largest second difference d[i+1] − 2 d[i] + d[i−1] (of equal ones the first). Fewer than three points have no
    bend: 0.

    Args:
        distances: (points, points) float64.
    """
    if len(distances) < 3:
        return 0.0
    nearest = (distances + torch.diag(torch.full((len(distances),), torch.inf, dtype=distances.dtype))).min(1).values
    ascending = nearest.sort().values
    return float(ascending[1 + int((ascending[2:] - 2 * ascending[1:-1] + ascending[:-2]).argmax())])


def dbscan(distances: Tensor, near: float, least: int) -> list[int]:
    """The clusters of DBSCAN (Ester et al., KDD 1996), in the order of their first core points.

    A point with ``least`` points, itself included, at most ``near`` away is a core point. Core points that are near each other
    are in one cluster; another point that is near a core point is in the earliest such cluster.

    Args:
        distances: (points, points), symmetric.

    Returns:
        For each point the number of its cluster, or ``NOISE``.
    """
    neighbors = [row.nonzero().flatten().tolist() for row in distances <= near]
    is_core = [len(of) >= least for of in neighbors]
    clusters = [NOISE] * len(neighbors)
    number = 0
    for first in range(len(neighbors)):
        if not is_core[first] or clusters[first] != NOISE:
            continue
        clusters[first], reached = number, [first]
        while reached:
            for other in neighbors[reached.pop()]:
                if clusters[other] == NOISE:
                    clusters[other] = number
                    reached += [other] if is_core[other] else []
        number += 1
    return clusters


def mean_embeddings(table: Tensor, words: Sequence[Sequence[int]]) -> Tensor:
    """Embeddings of words, (words, width) float32: the mean over a word's tokens of the rows of ``table``, in their order."""
    lengths = torch.tensor([len(word) for word in words])
    owner = torch.repeat_interleave(torch.arange(len(words)), lengths)
    sums = torch.zeros(len(words), table.shape[1]).index_add_(0, owner, table.float())
    return sums / lengths[:, None]
