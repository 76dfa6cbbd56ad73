"""Transformers that describe images for distribution metrics: DINOv2 (FD-DINOv2) and CLIP (CMMD, CLIP score).

Shapes: B images, h w pixels, D features.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from evaluation.features import Described, weights_digest
from tokenizer.resize import shrink_smoothly

DINO, CLIP = "facebook/dinov2-large", "openai/clip-vit-large-patch14-336"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana et al. 2024


def square_inputs(
    images_BCHW: torch.Tensor, side: int, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> torch.Tensor:
    """uint8 (B, 3, h, w) to normalised floats (B, 3, side, side): shortest side by antialiased bicubic, centre crop."""
    x = images_BCHW.to(device, torch.float32) / 255
    h, w = x.shape[-2:]
    scale = side / min(h, w)
    if (h, w) != (side, side):
        size = (max(side, round(h * scale)), max(side, round(w * scale)))
        x = shrink_smoothly(x, size).clamp(0, 1)
    top, left = ((length - side) // 2 for length in x.shape[-2:])
    return _normalised(x[..., top : top + side, left : left + side], mean, std)


def squeezed_inputs(
    images_BCHW: torch.Tensor, side: int, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> torch.Tensor:
    """uint8 (B, 3, h, w) to normalised floats (B, 3, side, side), whatever the shape: antialiased bicubic, unclamped.

    What EDM2's FD-DINOv2 does.
    """
    x = shrink_smoothly(images_BCHW.to(device, torch.float32), (side, side))
    return _normalised(x / 255, mean, std)


def _normalised(x_BCHW: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    centre, spread = (torch.tensor(values, device=x_BCHW.device).view(3, 1, 1) for values in (mean, std))
    return (x_BCHW - centre) / spread


class DinoFeatures:
    """DINOv2 ViT-L/14: the normalised class token (1024) of images at 224 x 224, as EDM2's FD-DINOv2 has it.

    model: a Hub id or a folder of a transformers DINOv2. Raises ValueError if it cannot be had.
    """

    def __init__(self, model: str | Path = DINO, device: str | torch.device = "cpu", *, side: int = 224) -> None:
        from transformers import Dinov2Model

        self.network = _pretrained(Dinov2Model, model).to(device)
        self.name, self.side = f"dinov2 {Path(model).name}", side

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of the weights."""
        return weights_digest(self.network)

    @torch.no_grad()
    def describe(self, images_BCHW: torch.Tensor) -> Described:
        """uint8 (B, 3, h, w) of any size, squeezed to a square. There are no classes: no log-posterior's columns."""
        x = squeezed_inputs(images_BCHW, self.side, IMAGENET_MEAN, IMAGENET_STD, self.network.device)
        features = self.network(pixel_values=x).pooler_output.cpu().double()
        return Described(features, features.new_zeros(len(features), 0))


class ClipFeatures:
    """CLIP ViT-L/14 at 336 pixels: normalised image and text embeddings.

    model: a Hub id or a folder of a transformers CLIP with its tokenizer. Raises ValueError if it cannot be had.
    """

    def __init__(self, model: str | Path = CLIP, device: str | torch.device = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.network = _pretrained(CLIPModel, model).to(device)
        self.tokenizer = _pretrained(AutoTokenizer, model)
        self.name, self.side = f"clip {Path(model).name}", self.network.config.vision_config.image_size

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of the weights."""
        return weights_digest(self.network)

    @torch.no_grad()
    def describe(self, images_BCHW: torch.Tensor) -> Described:
        """uint8 (B, 3, h, w) of any size, centre crops of wide ones. There are no classes."""
        x = square_inputs(images_BCHW, self.side, CLIP_MEAN, CLIP_STD, self.network.device)
        pooled = self.network.vision_model(pixel_values=x).pooler_output
        features = F.normalize(self.network.visual_projection(pooled).cpu().double(), dim=1)
        return Described(features, features.new_zeros(len(features), 0))

    @torch.no_grad()
    def texts(self, prompts: Sequence[str], *, batch_size: int = 256) -> torch.Tensor:
        """Normalised embeddings (B, D) float64 of texts, cut to the length CLIP knows."""
        length, found = self.network.config.text_config.max_position_embeddings, []
        for begin in range(0, len(prompts), batch_size):
            batch = list(prompts[begin : begin + batch_size])
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
            tokens = {name: tokens[name].to(self.network.device) for name in ("input_ids", "attention_mask")}
            pooled = self.network.text_model(**tokens).pooler_output
            found.append(F.normalize(self.network.text_projection(pooled).cpu().double(), dim=1))
        return torch.cat(found)


def clip_scores(images_ND: torch.Tensor, texts_ND: torch.Tensor) -> torch.Tensor:
    """100 max(cos, 0) of every image with its own text (Hessel et al. 2021): (N,).

    Raises ValueError if their numbers differ.
    """
    if len(images_ND) != len(texts_ND):
        raise ValueError(f"CLIP score needs one text an image, got {len(texts_ND)} for {len(images_ND)} images")
    return 100 * (images_ND * texts_ND).sum(1).clamp(min=0)


def cmmd(samples_ND: torch.Tensor, reference_MD: torch.Tensor) -> float:
    """CMMD: 1000 x MMD^2 of normalised CLIP embeddings under exp(-|x - y|^2 / (2 x 10^2)), as its authors' code has it.

    (Jayasumana et al. 2024; means include every image with itself.) Raises ValueError if a side is empty.
    """
    if not len(samples_ND) or not len(reference_MD):
        raise ValueError("CMMD needs images on both sides")

    def mean_kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        total = sum(float(torch.cdist(rows, b).square().div(-2 * CMMD_SIGMA**2).exp().sum()) for rows in a.split(2048))
        return total / (len(a) * len(b))

    inner = mean_kernel(samples_ND, samples_ND) + mean_kernel(reference_MD, reference_MD)
    return CMMD_SCALE * (inner - 2 * mean_kernel(samples_ND, reference_MD))


def _pretrained(kind: type, model: str | Path) -> nn.Module:
    try:
        made = kind.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} cannot be had as {kind.__name__}: {str(error).strip().splitlines()[0]}") from None
    return made.eval().requires_grad_(False) if isinstance(made, nn.Module) else made
