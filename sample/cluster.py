"""Which few of many images show what all of them show: pooled features, seeded k-means, nearest members.

Shapes: B images, T patch tokens of an image, D features of a token, F numbers that stand for an image, M clusters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

ROUNDS = 100  # of Lloyd's algorithm; it stops earlier when nothing moves


def mean_token(tokens_BTD: torch.Tensor) -> torch.Tensor:
    """The mean over an image's tokens: (B, T, D) to (B, D)."""
    return tokens_BTD.double().mean(dim=1)


def own_direction(tokens_BTD: torch.Tensor) -> torch.Tensor:
    """Each image's tokens along that image's own first principal direction: (B, T, D) to (B, T) (TTS-VAR, "pca").

    A principal direction has no sign of its own: its largest component is made positive, so that like images get
    like numbers.
    """
    centred = tokens_BTD.double() - tokens_BTD.double().mean(dim=1, keepdim=True)
    return torch.stack([_along_first(image) for image in centred])


def shared_direction(tokens_BTD: torch.Tensor) -> torch.Tensor:
    """All images' tokens along their common first principal direction: (B, T, D) to (B, T) (TTS-VAR, "pca_all")."""
    flat = tokens_BTD.double().flatten(0, 1)
    return _along_first(flat - flat.mean(dim=0)).view(tokens_BTD.shape[:2])


POOLINGS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "pca": own_direction,
    "pool": mean_token,
    "pca_all": shared_direction,
}


def _along_first(centred_TD: torch.Tensor) -> torch.Tensor:
    """Centred rows (T, D) along their first principal direction (T,), its largest component made positive."""
    _, vectors = torch.linalg.eigh(centred_TD.T @ centred_TD)
    direction = vectors[:, -1]
    return centred_TD @ (direction * torch.sign(direction[direction.abs().argmax()]))


def kmeans(x_BF: torch.Tensor, clusters: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm from a k-means++ start (Arthur and Vassilvitskii 2007): centres (M, F) and labels (B,).

    A cluster that loses all its members keeps its centre. Equal points can leave clusters empty.

    Args:
        generator: CPU generator; the same one gives the same clusters.

    Raises:
        ValueError: if `clusters` is not in 1..B.
    """
    if not 1 <= clusters <= len(x_BF):
        raise ValueError(f"clusters must be in 1..{len(x_BF)} (the points there are), got {clusters}")
    centres = _spread_out(x_BF, clusters, generator)
    labels = torch.cdist(x_BF, centres).argmin(dim=1)
    for _ in range(ROUNDS):
        members = [x_BF[labels == m] for m in range(clusters)]
        centres = torch.stack([own.mean(dim=0) if len(own) else centre for own, centre in zip(members, centres)])
        moved = torch.cdist(x_BF, centres).argmin(dim=1)
        if torch.equal(moved, labels):
            break
        labels = moved
    return centres, labels


def _spread_out(x_BF: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each further centre is a point drawn with probability proportional to its squared distance."""
    chosen = [int(torch.randint(len(x_BF), (), generator=generator))]
    while len(chosen) < clusters:
        distance = torch.cdist(x_BF, x_BF[chosen]).min(dim=1).values.square()
        distance[chosen] = 0
        if not distance.sum() > 0:  # only copies of chosen points are left
            distance = torch.ones(len(x_BF), dtype=x_BF.dtype)
            distance[chosen] = 0
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    return x_BF[chosen]


def representatives(x_BF: torch.Tensor, keep: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """`keep` different rows, ascending, that stand for all: the nearest member of each of `keep` clusters.

    Rows that fill up for empty clusters (there are fewer different points than `keep`) are the first ones left.

    Returns:
        The rows, and the cluster of every row (B,).
    """
    x_BF = x_BF.detach().cpu().double()
    centres, labels = kmeans(x_BF, keep, generator)
    distances = torch.cdist(x_BF, centres)
    kept = []
    for m in range(keep):
        members = (labels == m).nonzero()[:, 0]
        if len(members):
            kept.append(int(members[distances[members, m].argmin()]))
    kept += [row for row in range(len(x_BF)) if row not in kept][: keep - len(kept)]
    return sorted(kept), labels.tolist()
