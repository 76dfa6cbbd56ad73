"""What a network says about images, for distribution metrics, and a stream of images described by one.

Shapes: B or N images, h w pixels, D features, P classes, S spatial features.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import nn

from evaluation.guards import check_features


@dataclass(frozen=True)
class Described:
    """What a network says about N images: features (N, D) float64, and the log-posterior of its classes (N, P).

    spatial: features (N, S) float32 that keep positions, for sFID; None where nobody asked for them.
    """

    features: torch.Tensor
    log_posterior: torch.Tensor
    spatial: torch.Tensor | None = None

    @classmethod
    def joined(cls, parts: Sequence["Described"]) -> "Described":
        """The rows of all parts, in order, on the CPU."""
        spatial = None
        if parts[0].spatial is not None:
            spatial = torch.cat([part.spatial.cpu() for part in parts])
        features, log_posterior = (
            torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("features", "log_posterior")
        )
        return cls(features, log_posterior, spatial)

    def __len__(self) -> int:
        return len(self.features)


class Describer(Protocol):
    """A network for distribution metrics: `describe` maps uint8 (B, 3, h, w) to `Described`, B rows each.

    name: as protocols call it.  digest: twelve hexadecimal digits of its weights.
    """

    name: str

    @property
    def digest(self) -> str: ...

    def describe(self, images_BCHW: torch.Tensor) -> Described: ...


def weights_digest(module: nn.Module) -> str:
    """Twelve hexadecimal digits that change with any weight of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def describe_all(describer: Describer, images: Iterable[np.ndarray], *, batch_size: int = 64) -> Described:
    """Describe a stream of uint8 (h, w, 3) images in batches of one size; rows in their order, on the CPU.

    Raises ValueError if there are none.
    """
    found: list[Described] = []
    batch: list[np.ndarray] = []

    def flush() -> None:
        described = describer.describe(rearrange(torch.from_numpy(np.stack(batch)), "b h w c -> b c h w"))
        check_features(described.features, first=sum(map(len, found)))
        found.append(Described.joined([described]))
        batch.clear()

    for image in images:
        if len(batch) == batch_size or (batch and batch[0].shape != image.shape):
            flush()
        batch.append(image)
    if batch:
        flush()
    if not found:
        raise ValueError("images must not be empty: there is nothing to describe")
    return Described.joined(found)
