"""How much of a set of real images a set of samples covers, and how much of it lies there: neighbourhoods of features.

Precision and recall are Kynkäänniemi et al. 2019 as in ADM's evaluator, density and coverage Naeem et al. 2020. All are
shares of images (density may exceed 1), and all depend on how many images are on each side: ADM compares 10,000
reference images with 50,000 samples.

Shapes: N samples, M reference images, D features, k neighbours.
"""

import torch

PRECISION_NEIGHBOURS = 3  # Kynkäänniemi et al., and ADM
DENSITY_NEIGHBOURS = 5  # Naeem et al.
BLOCK = 4096  # rows of a distance matrix in memory at once


def neighbourhoods(
    samples_ND: torch.Tensor,
    reference_MD: torch.Tensor,
    *,
    precision_k: int = PRECISION_NEIGHBOURS,
    density_k: int = DENSITY_NEIGHBOURS,
) -> dict[str, float]:
    """`precision`, `recall`, `density` and `coverage` of samples, from features of one network.

    Every image has a ball, up to its k-th nearest neighbour on its own side (itself not counted). precision: the share
    of samples in a ball of the reference. recall: the share of the reference in a ball of the samples. density: how
    many balls of the reference a sample is in, over k. coverage: the share of the reference with a sample in its ball.
    Distances are squared, float32, of features centred on the reference, with room for rounding at the balls' edges.

    Raises ValueError if a side has no more than k images, or the numbers of features differ.
    """
    if samples_ND.shape[1] != reference_MD.shape[1]:
        raise ValueError(
            f"features must be of one network, got {samples_ND.shape[1]} and {reference_MD.shape[1]} of them"
        )
    needed = max(precision_k, density_k) + 1
    if min(len(samples_ND), len(reference_MD)) < needed:
        raise ValueError(
            f"precision, recall, density and coverage need {needed} images or more on each side, "
            f"got {len(samples_ND)} samples and {len(reference_MD)} reference images"
        )
    centre = reference_MD.double().mean(0)
    samples, reference = ((x.double() - centre).float() for x in (samples_ND, reference_MD))
    sample_radii = _radii(samples, (precision_k,))[0]
    reference_radii, density_radii = _radii(reference, (precision_k, density_k))
    inside = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled, covered = [], []
    for rows in torch.arange(len(reference)).split(BLOCK):
        distances = _squared_distances(reference[rows], samples) - _room(reference[rows], samples)
        precise |= (distances <= reference_radii[rows, None]).any(0)
        dense = distances <= density_radii[rows, None]
        inside += dense.sum(0)
        covered.append(dense.any(1))
        recalled.append((distances <= sample_radii).any(1))
    return {
        "precision": float(precise.double().mean()),
        "recall": float(torch.cat(recalled).double().mean()),
        "density": float(inside.double().mean() / density_k),
        "coverage": float(torch.cat(covered).double().mean()),
    }


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm(b.square().sum(1)[None] + a.square().sum(1)[:, None], a, b.T, alpha=-2).clamp(min=0)


def _room(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What rounding may add to squared distances: they are differences of sums of these sizes."""
    return 4 * torch.finfo(a.dtype).eps * (b.square().sum(1)[None] + a.square().sum(1)[:, None])


def _radii(features_ND: torch.Tensor, ks: tuple[int, ...]) -> list[torch.Tensor]:
    """Squared distances (N,) of each row to its k-th nearest other row, for each k."""
    found: list[list[torch.Tensor]] = [[] for _ in ks]
    for rows in torch.arange(len(features_ND)).split(BLOCK):
        distances = _squared_distances(features_ND[rows], features_ND)
        distances[torch.arange(len(rows)), rows] = -1  # itself, before any copy of it
        nearest = distances.topk(max(ks) + 1, largest=False).values
        for radii, k in zip(found, ks, strict=True):
            radii.append(nearest[:, k])
    return [torch.cat(radii) for radii in found]
