"""Image losses of tokenizer training: pixels, perceptual distance, adversary (VQGAN, section 3.1 and its appendix).

Shapes: B images in [-1, 1] as (B, 3, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F


def pixel_loss(x: torch.Tensor, target: torch.Tensor, *, l1: float, l2: float) -> torch.Tensor:
    """l1 * mean |x - target| + l2 * mean (x - target)^2, a float32 scalar."""
    difference = x.float() - target.float()
    return l1 * difference.abs().mean() + l2 * difference.square().mean()


def gradient_loss(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the images' finite differences: keeps edges and corners sharp. Float32 scalar."""
    difference = x.float() - target.float()
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def feature_distance(features_x: Sequence[torch.Tensor], features_y: Sequence[torch.Tensor]) -> torch.Tensor:
    """Squared distance of channel-normalised feature maps, averaged over layers (LPIPS, equation 1, unit weights)."""
    distances = []
    for x, y in zip(features_x, features_y):
        difference = F.normalize(x.float(), dim=1, eps=1e-6) - F.normalize(y.float(), dim=1, eps=1e-6)
        distances.append(difference.square().sum(dim=1).mean())
    return torch.stack(distances).mean()


class PerceptualLoss(nn.Module):
    """Distance of images in the feature space of a frozen network.

    Args:
        features: frozen callable, images (B, 3, h, w) in [-1, 1] to a list of feature maps (B, c, h', w').
    """

    def __init__(self, features: Callable[[torch.Tensor], Sequence[torch.Tensor]]):
        super().__init__()
        self.features = features
        if isinstance(features, nn.Module):
            features.requires_grad_(False).eval()

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Scalar distance; no gradient reaches `target`."""
        with torch.no_grad():
            wanted = self.features(target)
        return feature_distance(self.features(x), wanted)


class LpipsLoss(nn.Module):
    """LPIPS (2018) through torchmetrics; needs the `lpips` extra and its downloaded backbone.

    Raises:
        ValueError: if the extra is not installed.
    """

    def __init__(self, net: str = "vgg"):
        super().__init__()
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.metric = LearnedPerceptualImagePatchSimilarity(net_type=net).requires_grad_(False)
        except (ImportError, ModuleNotFoundError) as error:
            raise ValueError(f"perceptual: lpips needs the extra: pip install 'nextscale[lpips]' ({error})") from None

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Scalar distance of images in [-1, 1]."""
        return self.metric.net(x.clamp(-1, 1), target, normalize=False).mean()


class PatchDiscriminator(nn.Module):
    """PatchGAN: strided 4x4 convolutions, one realness logit per patch (pix2pix, appendix 6.1.2).

    Args:
        width: channels of the first layer, doubled per layer up to 8x.
        layers: strided layers; the receptive field is 16, 34, 70 pixels for 1, 2, 3 of them.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            blocks += [nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False)]
            blocks += [nn.GroupNorm(min(32, widths[i]), widths[i]), nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, h, w) to logits (B, 1, h', w')."""
        return self.net(image)


def hinge_d_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """The discriminator's hinge loss, a float32 scalar."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def hinge_g_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The generator's side of the hinge loss, a float32 scalar."""
    return -fake_logits.float().mean()


def adaptive_weight(
    reconstruction: torch.Tensor,
    adversarial: torch.Tensor,
    last_weight: torch.Tensor,
    *,
    low: float = 0.0,
    high: float = 1e4,
) -> torch.Tensor:
    """Weight that gives the adversary as much gradient at the decoder's last layer as the reconstruction has.

    |grad reconstruction| / (|grad adversarial| + 1e-4), clamped to [low, high] (VQGAN, equation 7).
    """
    grads = [
        torch.autograd.grad(loss, last_weight, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    ]
    return (grads[0] / (grads[1] + 1e-4)).clamp(low, high).detach()
