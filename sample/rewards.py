"""What a search is told: rewards, which score images for their prompts, and features, by which they are compared.

Both are plug-ins found by name and loaded only when asked for. Images are uint8 (B, 3, h, w), sRGB.

Shapes: B images, h w pixels, T patch tokens, D features of a token.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from tokenizer.resize import average

Prompts = Sequence[str | int]  # texts, or classes of a class model


class Reward(Protocol):
    """Scores images for their prompts, higher is better.

    Attributes:
        name: as it was asked for.
    """

    name: str

    def __call__(self, images_BCHW: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        """uint8 (B, 3, h, w) and B prompts to float32 (B,)."""


class Features(Protocol):
    """Describes images or their patches, so that like images can be grouped.

    Attributes:
        name: as it was asked for.
    """

    name: str

    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, h, w) to float32 (B, T, D), which are pooled; or (B, D), compared as they are."""


# --- rewards ---------------------------------------------------------------------------------------------------------


class ClipScore:
    """Cosine between a picture and its text in a CLIP model of transformers, in [-1, 1]; PickScore is one such model.

    Args:
        model: a CLIP folder or Hub id.
        processor: where its tokenizer and preprocessing are; `model` when None.

    Raises:
        FileNotFoundError: if the model cannot be had.
    """

    def __init__(self, model: str, processor: str | None = None, *, name: str = "clip", device: Any = "cpu"):
        from transformers import AutoProcessor, CLIPModel

        self.name, self.device = name, device
        self.model = load(CLIPModel.from_pretrained, model).eval().to(device)
        self.processor = load(AutoProcessor.from_pretrained, processor or model)

    @torch.no_grad()
    def __call__(self, images_BCHW: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        """uint8 (B, 3, h, w) and B texts to (B,)."""
        given = self.processor(
            text=texts(prompts), images=list(images_BCHW.cpu()), return_tensors="pt", padding=True, truncation=True
        )
        output = self.model(**given.to(self.device))
        return F.cosine_similarity(output.image_embeds, output.text_embeds).float().cpu()


class Aesthetic:
    """LAION's aesthetic predictor v2 on CLIP ViT-L/14, divided by 10 as in TTS-VAR; it does not read prompts.

    Args:
        weights: `sac+logos+ava1-l14-linearMSE.pth` of LAION: linear layers "layers.N.weight" and "layers.N.bias".
        clip: the CLIP model whose image embedding it reads.

    Raises:
        FileNotFoundError: if a file or model cannot be had.
    """

    name = "aesthetic"

    def __init__(self, weights: str, clip: str = "openai/clip-vit-large-patch14", *, device: Any = "cpu"):
        from transformers import AutoImageProcessor, CLIPModel

        if not Path(weights).is_file():
            raise FileNotFoundError(f"reward aesthetic: no such file {weights}")
        self.device = device
        self.model = load(CLIPModel.from_pretrained, clip).eval().to(device)
        self.processor = load(AutoImageProcessor.from_pretrained, clip)
        state = torch.load(weights, map_location=device, weights_only=True)
        numbers = sorted({int(key.split(".")[1]) for key in state})
        self.layers = [(state[f"layers.{n}.weight"].float(), state[f"layers.{n}.bias"].float()) for n in numbers]

    @torch.no_grad()
    def __call__(self, images_BCHW: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        """uint8 (B, 3, h, w) to (B,)."""
        given = self.processor(images=list(images_BCHW.cpu()), return_tensors="pt").to(self.device)
        pooled = self.model.vision_model(**given).pooler_output
        x = F.normalize(self.model.visual_projection(pooled).float(), dim=-1)
        for weight, bias in self.layers:
            x = F.linear(x, weight, bias)
        return x[:, 0].cpu() / 10


class Callback:
    """A Python function as a reward: function(images, prompts) to B numbers, images as uint8 numpy (B, h, w, 3)."""

    def __init__(self, function: Callable[[np.ndarray, list], Any], name: str | None = None):
        self.function, self.name = function, name or getattr(function, "__name__", "function")

    def __call__(self, images_BCHW: torch.Tensor, prompts: Prompts) -> torch.Tensor:
        """uint8 (B, 3, h, w) and B prompts to (B,)."""
        images = rearrange(images_BCHW.cpu(), "b c h w -> b h w c").numpy()
        try:
            given = self.function(images, list(prompts))
        except Exception as error:
            raise ValueError(f"reward {self.name} raised {type(error).__name__}: {error}") from error
        try:
            return torch.as_tensor(np.asarray(given), dtype=torch.float32)
        except (TypeError, ValueError):
            raise ValueError(f"reward {self.name} must give a number for each image, got {given!r:.80}") from None


def image_reward(*, device: Any = "cpu") -> Callback:
    """ImageReward v1.0 through its own package (`pip install image-reward`)."""
    package = optional("ImageReward", "imagereward", "image-reward")
    model = package.load("ImageReward-v1.0", device=str(device))
    return Callback(_one_by_one(lambda picture, prompt: model.score(prompt, [picture])), "imagereward")


def hps(*, device: Any = "cpu") -> Callback:
    """HPS v2.1 through its own package (`pip install hpsv2`), which chooses its device itself."""
    package = optional("hpsv2", "hps", "hpsv2")
    return Callback(_one_by_one(lambda picture, prompt: package.score([picture], prompt, hps_version="v2.1")[0]), "hps")


def _one_by_one(score: Callable[[Any, str], float]) -> Callable[[np.ndarray, list], list[float]]:
    """A scorer of one PIL image and text as one of arrays and lists."""
    from PIL import Image

    return lambda images, prompts: [
        float(score(Image.fromarray(image), text)) for image, text in zip(images, texts(prompts))
    ]


def check_scores(scores: torch.Tensor, reward: Reward, rows: int) -> torch.Tensor:
    """Scores (B,) on the CPU in float32.

    Raises:
        ValueError: naming the reward, if they are not `rows` finite numbers.
    """
    scores = torch.as_tensor(scores).detach().float().cpu()
    if scores.shape != (rows,):
        raise ValueError(f"reward {reward.name} must give {rows} scores for {rows} images, got {tuple(scores.shape)}")
    if not scores.isfinite().all():
        raise ValueError(f"reward {reward.name} gave {scores[~scores.isfinite()][0].item()}: scores must be finite")
    return scores


# --- features --------------------------------------------------------------------------------------------------------


class PixelFeatures:
    """Average colours of a `side` x `side` grid of patches, in [0, 1]; needs no network."""

    name = "pixels"

    def __init__(self, side: int = 16):
        self.side = side

    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, h, w) to (B, side * side, 3)."""
        small = average(images_BCHW.float() / 255, (self.side, self.side))
        return rearrange(small, "b c h w -> b (h w) c").cpu()


class FunctionFeatures:
    """A Python function as features: function(images) to B rows of numbers (B, D), or a row a patch, (B, T, D).

    Images are uint8 numpy (B, h, w, 3).
    """

    def __init__(self, function: Callable[[np.ndarray], Any], name: str | None = None):
        self.function, self.name = function, name or getattr(function, "__name__", "function")

    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, h, w) to float32 (B, D) or (B, T, D)."""
        images = rearrange(images_BCHW.cpu(), "b c h w -> b h w c").numpy()
        try:
            given = self.function(images)
        except Exception as error:
            raise ValueError(f"features {self.name} raised {type(error).__name__}: {error}") from error
        try:
            found = torch.as_tensor(np.asarray(given), dtype=torch.float32)
        except (TypeError, ValueError):
            raise ValueError(f"features {self.name} must give numbers, got {given!r:.80}") from None
        if found.ndim not in (2, 3) or len(found) != len(images) or not found.isfinite().all():
            shape = tuple(found.shape)
            raise ValueError(f"features {self.name} must give {len(images)} finite rows (or rows of rows), got {shape}")
        return found


class VisionFeatures:
    """Patch tokens of the last layer of any vision transformer of transformers: DINOv2, CLIP, ...

    Args:
        model: a folder or Hub id, e.g. facebook/dinov2-large (TTS-VAR's, without registers).

    Raises:
        FileNotFoundError: if it cannot be had.
    """

    def __init__(self, model: str, *, name: str | None = None, device: Any = "cpu"):
        from transformers import AutoImageProcessor, AutoModel

        self.name, self.device = name or model, device
        whole = load(AutoModel.from_pretrained, model)
        self.model = getattr(whole, "vision_model", whole).eval().to(device)
        self.processor = load(AutoImageProcessor.from_pretrained, model)
        size = getattr(self.processor, "crop_size", None) or self.processor.size
        self.side = size["height"] if "height" in size else size["shortest_edge"]

    @torch.no_grad()
    def __call__(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 (B, 3, h, w) to (B, T, D); the class token and registers, which come first, are left out.

        Whole images are resized to the network's square, as TTS-VAR's code does: a crop would hide the sides.
        """
        square = {"size": {"height": self.side, "width": self.side}, "do_resize": True, "do_center_crop": False}
        given = self.processor(images=list(images_BCHW.cpu()), return_tensors="pt", **square).to(self.device)
        tokens = self.model(**given).last_hidden_state
        patch = self.model.config.patch_size
        patches = (given["pixel_values"].shape[-2] // patch) * (given["pixel_values"].shape[-1] // patch)
        return tokens[:, -patches:].float().cpu()


# --- what they share -------------------------------------------------------------------------------------------------


def optional(module: str, reward: str, package: str) -> Any:
    """An optional package.

    Raises:
        ValueError: if it is not installed, saying how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"reward {reward} needs: pip install {package} ({error})") from None


def load(from_pretrained: Callable[[str], Any], model: str) -> Any:
    """A part of transformers by folder or Hub id.

    Raises:
        FileNotFoundError: if it cannot be had, in one line.
    """
    try:
        return from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"model {model!r} cannot be had: {reason}") from None


def texts(prompts: Prompts) -> list[str]:
    """The prompts, if they are texts.

    Raises:
        TypeError: if one is a class.
    """
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"this reward reads texts, and the model was asked for class {prompt!r}")
    return list(prompts)


def to_images(decoded_BCHW: torch.Tensor) -> torch.Tensor:
    """What a decoder gives, about [-1, 1], to uint8 (B, 3, h, w): what a PNG of it holds."""
    return ((decoded_BCHW.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def eval_without_gradients(module: nn.Module) -> nn.Module:
    """A network ready to score."""
    return module.eval().requires_grad_(False)
