"""Zero-shot editing: in-painting, out-painting and class edits as one hook on tokens (VAR, section 5.3).

The image's own tokens stand in for the drawn ones wherever the mask keeps the picture. The result is pasted back, so
that kept pixels come out bit by bit as they went in.

Shapes: B images, L all tokens, l tokens of one scale, C latent channels, H W the latent grid, h w pixels or the grid of
one scale, n bits of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional as F

from sample.pixels import CorruptImage, to_eight_bits, to_rgb
from sample.state import GenerationState, Hook
from tokenizer.model import MultiScaleVQ
from tokenizer.schedule import ScaleSchedule

RULES = ("corrected", "official", "whole")
SMALLEST = 3  # a scale of so few tokens is the image's own wherever anything is kept (the official notebook)

Picture = Image.Image | np.ndarray


class EditHook(Hook):
    """Gives tokens, which hold whatever is drawn in their place and follow their image through every `state.select`.

    A given token is what the picture lacks at its scale after the picture's own coarser tokens. Once other tokens were
    drawn, here and there, the picture lacks something else: with latents, the kept tokens of the scales after them are
    chosen anew, so that the kept part comes out as it was whatever was drawn around it (ours; the official code keeps
    the picture's tokens).

    Args:
        given_BL: for each image of the request its own tokens, int64 (B, L), or (B, L, n) where they are bits; -1 where
            one is to be drawn. See `edit_hook`.
        latent_BCHW: of each image; None keeps the given tokens as they are.
    """

    def __init__(self, given_BL: torch.Tensor, latent_BCHW: torch.Tensor | None = None):
        self.given_BL, self.latent_BCHW = given_BL, latent_BCHW

    def of_images(self, images: Sequence[int]) -> EditHook:
        """The hook for some of the images."""
        rows = list(images)
        return EditHook(self.given_BL[rows], None if self.latent_BCHW is None else self.latent_BCHW[rows])

    def on_start(self, state: GenerationState) -> None:
        """Give the tokens to the rows of their images."""
        origins = torch.tensor(state.origins)
        if len(self.given_BL) <= max(state.origins):
            raise ValueError(f"given tokens are of {len(self.given_BL)} images, the batch has {max(state.origins) + 1}")
        state.extras["given"] = self.given_BL[origins].to(state.f_hat_BCHW.device)
        if self.latent_BCHW is not None:
            state.extras["latent"] = self.latent_BCHW[origins].to(state.f_hat_BCHW)

    def on_scale_begin(self, state: GenerationState, k: int) -> None:
        """Bring the given tokens of scale k up to date: what earlier, drawn tokens still lack of the image."""
        schedule, given_BL = state.plan.schedule, state.extras["given"]
        if self.latent_BCHW is None or not k:
            return
        before, given_Bl, after = given_BL.tensor_split((schedule.begins[k], schedule.ends[k]), dim=1)
        missing_Bl = state.quantizer.choose(state.extras["latent"] - state.f_hat_BCHW, k, schedule)
        drawn_B = (before < 0).flatten(1).any(dim=1).view(-1, *[1] * (given_Bl.ndim - 1))
        given_Bl = torch.where(drawn_B & (given_Bl >= 0), missing_Bl, given_Bl)
        state.extras["given"] = torch.cat([before, given_Bl, after], dim=1)


def kept_tokens(keep_BHW: torch.Tensor, schedule: ScaleSchedule, rule: str = "corrected") -> torch.Tensor:
    """Which tokens of each scale the image keeps: bool (B, L), from the bool mask (B, H, W) of the finest scale.

    Args:
        rule: "corrected" and "official" resize the mask bilinearly and keep what is above a half (the official
            notebook). "whole" keeps the cells in which nothing is repainted, so that what was there has less say. All
            keep scales of up to 3 tokens. An image that keeps nothing has no kept token at all.

    Raises:
        ValueError: on another rule, or a mask of another size.
    """
    if rule not in RULES:
        raise ValueError(f"mask_rule must be one of {', '.join(RULES)}, got {rule!r}")
    if tuple(keep_BHW.shape[1:]) != schedule.latent_hw:
        raise ValueError(f"mask of the finest scale must be {schedule.latent_hw}, got {tuple(keep_BHW.shape[1:])}")
    keep_B1HW = keep_BHW[:, None].float()
    kept = []
    for side, length in zip(schedule.sides, schedule.lengths):
        if rule == "whole":
            keep_B1hw = 1 - F.adaptive_max_pool2d(1 - keep_B1HW, side)
        else:
            keep_B1hw = F.interpolate(keep_B1HW, size=side, mode="bilinear")
        keep_Bl = rearrange(keep_B1hw > 0.5, "b 1 h w -> b (h w)")
        kept.append(keep_Bl | (length <= SMALLEST))
    return torch.cat(kept, dim=1) & keep_BHW.flatten(1).any(dim=1, keepdim=True)


@torch.no_grad()
def edit_hook(
    vqvae: MultiScaleVQ, image_B3hw: torch.Tensor, keep_BHW: torch.Tensor, schedule: ScaleSchedule, rule: str
) -> EditHook:
    """The hook that keeps the cells where `keep_BHW` is true of images (B, 3, h, w) in [-1, 1], by one of `RULES`."""
    latent_BCHW = vqvae.encode(image_B3hw.to(vqvae.dtype)).float()
    ids = torch.cat(vqvae.quantizer.encode(latent_BCHW, schedule), dim=1)
    kept_BL = kept_tokens(keep_BHW.cpu(), schedule, rule).to(ids.device)  # max pooling errs on MPS
    given = ids.masked_fill(~kept_BL.view(*kept_BL.shape, *[1] * (ids.ndim - 2)), -1)
    return EditHook(given, None if rule == "official" else latent_BCHW)


# --- pictures in and out ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Canvas:
    """A picture to be edited.

    Attributes:
        image_hw3: uint8.
        repaint_hw: float32 in [0, 1]: 0 keeps a pixel, 1 repaints it, between them the two are blended.
        window: (left, top, right, bottom) in pixels, the part that the model sees.
    """

    image_hw3: np.ndarray
    repaint_hw: np.ndarray
    window: tuple[int, int, int, int]

    @classmethod
    def of(cls, image: Picture, mask: Picture, model_hw: tuple[int, int]) -> Canvas:
        """A picture and its mask, white where it is to be repainted; a mask of another size is stretched.

        Raises:
            TypeError: if one is no PIL image and no uint8 array (masks also: bool).
            ValueError: if no window of the model's shape holds all of the mask.
        """
        image_hw3, repaint_hw = _read_image(image), _read_mask(mask)
        h, w = image_hw3.shape[:2]
        if repaint_hw.shape != (h, w):
            stretched = Image.fromarray(repaint_hw).resize((w, h), Image.Resampling.BILINEAR)
            repaint_hw = np.asarray(stretched).clip(0, 1)
        return cls(image_hw3, repaint_hw, _window(repaint_hw, model_hw))

    def seen(self, model_hw: tuple[int, int]) -> torch.Tensor:
        """The window as the model reads it: (3, h, w) in [-1, 1]."""
        left, top, right, bottom = self.window
        pixels = torch.tensor(self.image_hw3[top:bottom, left:right], dtype=torch.float32)
        return _resize(rearrange(pixels / 127.5 - 1, "h w c -> c h w"), model_hw).clamp(-1, 1)

    def keep(self, latent_hw: tuple[int, int]) -> torch.Tensor:
        """The latent cells (H, W) of the window in which no pixel is mostly repainted, bool."""
        left, top, right, bottom = self.window
        repaint_1hw = torch.tensor(self.repaint_hw[top:bottom, left:right])[None]
        return F.adaptive_max_pool2d(repaint_1hw, latent_hw)[0] < 0.5

    def repaint(self, model_hw: tuple[int, int]) -> torch.Tensor:
        """How far each pixel that the model draws is repainted, (1, h, w) in [0, 1]."""
        left, top, right, bottom = self.window
        return _resize(torch.tensor(self.repaint_hw[top:bottom, left:right])[None], model_hw).clamp(0, 1)

    def paste(self, made_3hw: torch.Tensor) -> np.ndarray:
        """The picture with the window of `made_3hw`, in [0, 1], where it is repainted: (h, w, 3) float32 in [0, 1].

        A pixel whose mask is 0 is its own level / 255, so it is the same byte again.
        """
        left, top, right, bottom = self.window
        made = _resize(made_3hw.float().cpu(), (bottom - top, right - left)).clamp(0, 1)
        whole = self.image_hw3.astype(np.float32) / 255
        inside = whole[top:bottom, left:right]
        alpha = self.repaint_hw[top:bottom, left:right, None]
        blended = inside * (1 - alpha) + rearrange(made, "c h w -> h w c").numpy() * alpha
        whole[top:bottom, left:right] = np.where(alpha > 0, blended, inside)
        return whole


def read_canvases(
    image: Picture | Sequence[Picture], mask_image: Picture | Sequence[Picture], model_hw: tuple[int, int], count: int
) -> list[Canvas]:
    """One canvas a prompt; a single picture or mask serves all `count` prompts.

    Raises:
        ValueError: if there are several pictures or masks, but not one a prompt; and as `Canvas.of`.
        TypeError: as `Canvas.of`.
    """
    listed = {}
    for name, given in (("image", image), ("mask_image", mask_image)):
        several = isinstance(given, list | tuple) or (
            isinstance(given, np.ndarray) and given.ndim == 3 + (name == "image")
        )
        listed[name] = list(given) if several else [given]
        if len(listed[name]) not in (1, count):
            raise ValueError(f"{name} must be one or one a prompt, got {len(listed[name])} for {count}")
    images, masks = (given * count if len(given) == 1 else given for given in listed.values())
    return [Canvas.of(picture, mask, model_hw) for picture, mask in zip(images, masks)]


def extend(
    image: Picture, *, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """A picture with borders to out-paint, in pixels, and the mask that repaints them.

    The borders show the picture's edge drawn out, so that coarse tokens begin from its colours.

    Raises:
        ValueError: if a border is negative or all are 0.
    """
    borders = {"left": left, "top": top, "right": right, "bottom": bottom}
    if min(borders.values()) < 0 or not any(borders.values()):
        raise ValueError(f"borders must be 0 or more pixels, and one above 0, got {borders}")
    rows, columns = (top, bottom), (left, right)
    pixels = _read_image(image)
    wider = np.pad(pixels, (rows, columns, (0, 0)), mode="edge")
    mask = np.pad(np.zeros(pixels.shape[:2], np.uint8), (rows, columns), constant_values=255)
    return Image.fromarray(wider), Image.fromarray(mask)


def _read_image(image: Picture) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(image, upright=False))  # masks are of the picture as it lies
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        return image
    raise TypeError(f"image must be a PIL image or a uint8 array (h, w, 3), got {_kind(image)}")


def grey(mask: Image.Image) -> Image.Image:
    """A mask in 8 bits; one of 16 is scaled, unless its levels are those of 8.

    Raises:
        ValueError: for float levels, whose range no file states; for transparent places, which programs use both ways.
    """
    if mask.has_transparency_data and np.asarray(mask.convert("RGBA"))[..., 3].min() < 255:
        raise CorruptImage("transparency may mean repaint or keep; save the mask without, on black or on white")
    if mask.mode == "F":
        raise CorruptImage("float levels have no stated range; save the mask as 8 or 16 bits")
    if mask.mode.startswith("I") and np.asarray(mask).max() > 255:
        mask = to_eight_bits(mask)
    return mask.convert("L")


def _read_mask(mask: Picture) -> np.ndarray:
    if isinstance(mask, Image.Image):
        mask = np.asarray(grey(mask))
    if isinstance(mask, np.ndarray) and mask.ndim == 2 and mask.dtype in (np.uint8, np.bool_):
        return mask.astype(np.float32) / (255 if mask.dtype == np.uint8 else 1)
    raise TypeError(f"mask_image must be a PIL image or a uint8 or bool array (h, w), got {_kind(mask)}")


def _kind(value: object) -> str:
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"{type(value).__name__} {value.dtype} {tuple(value.shape)}"
    return type(value).__name__


def _window(repaint_hw: np.ndarray, model_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest box of the model's shape in the picture, as central as it can be with all of the mask inside."""
    h, w = repaint_hw.shape
    height, width = min(h, round(w * model_hw[0] / model_hw[1])), min(w, round(h * model_hw[1] / model_hw[0]))
    starts = []
    for axis, size, whole in ((1, height, h), (0, width, w)):
        marked = np.flatnonzero((repaint_hw > 0).any(axis=axis))
        first, last = (marked[0], marked[-1] + 1) if len(marked) else (whole // 2, whole // 2)
        if last - first > size:
            raise ValueError(
                f"mask_image spans {last - first} pixels, and the model, which draws {model_hw[1]}x{model_hw[0]}, "
                f"sees {width}x{height} of this {w}x{h} image at once: repaint less (one border after the other), or "
                "crop the image"
            )
        starts.append(int(np.clip((whole - size) // 2, last - size, first)))
    return starts[1], starts[0], starts[1] + width, starts[0] + height


def _resize(image_3hw: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
    if tuple(image_3hw.shape[1:]) == tuple(hw):
        return image_3hw
    return F.interpolate(image_3hw[None], size=tuple(hw), mode="bicubic", antialias=True)[0]
