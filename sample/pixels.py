"""Picture files to 8-bit RGB, and to the square (or h x w) uint8 crop that a model is trained on.

Shape letters: 3 channels, H height, W width of the crop.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif", ".jp2")
LARGE = 2**24  # pixels of a resized image from which on it is not made whole
MAX_PIXELS = 89_478_485  # Pillow's own decompression-bomb warning level: about 9,459 x 9,459


class CorruptImage(ValueError):
    """An image that cannot be read; the message is the reason."""


def to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (`I;16*`, or `I` as some files are opened) scaled to 8 bits; Pillow's own convert would clip it.

    Any other picture comes back as it is. Raises CorruptImage for integers of more bits.
    """
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise CorruptImage(f"integer pixels of [{values.min()}, {values.max()}] are outside 16 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def to_rgb(image: Image.Image, *, upright: bool = True) -> Image.Image:
    """Any Pillow mode to 8-bit RGB: EXIF orientation applied if it is to be `upright`, transparency put on white.

    Raises CorruptImage for float pixels, whose range no file states.
    """
    if upright and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise CorruptImage("float pixels have no stated range; save the image as 8 or 16 bits")
    image = to_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(
    source: bytes | str | os.PathLike | Image.Image | None, *, at_least: int | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """One image file (bytes or path) or Pillow image as 8-bit RGB. None stands for a row without an image.

    at_least: lets a JPEG be decoded at 1/2, 1/4 or 1/8 size as long as both sides stay at least this many pixels.
    max_pixels: larger images are refused before their pixels are decoded.
    Raises CorruptImage with the reason, whatever the decoder raised.
    """
    if source is None:
        raise CorruptImage("there is no image (tar shards must hold images of one type)")
    try:
        if isinstance(source, Image.Image):
            return to_rgb(source)
        file: BinaryIO | str | os.PathLike = io.BytesIO(source) if isinstance(source, bytes) else source
        with unlimited(), Image.open(file) as image:  # our own limit follows, before any pixel is decoded
            width, height = image.size
            if width * height > max_pixels:
                raise CorruptImage(f"{width}x{height} pixels are more than max_pixels={max_pixels}")
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            return to_rgb(image)
    except CorruptImage:
        raise
    except UnidentifiedImageError:
        raise CorruptImage("no image format that Pillow knows") from None
    except Exception as error:  # Pillow's plug-ins raise OSError, SyntaxError, struct.error, zlib.error, ...
        raise CorruptImage(f"{type(error).__name__}: {error}".replace("\n", " ")) from error


@contextmanager
def unlimited() -> Iterator[None]:
    """Pillow's limit of an image's size lifted meanwhile."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def crop(
    image: Image.Image,
    size: tuple[int, int],
    *,
    resize_factor: float = 1.125,
    uniforms: tuple[float, float] | None = None,
    mirror: bool = False,
) -> torch.Tensor:
    """Resize so that the image just covers `resize_factor * size` (LANCZOS), then cut `size` out of it.

    size: (h, w) of the crop.  uniforms: two numbers in [0, 1) that place it (down, across); None is the centre.
    Returns uint8 (3, h, w) in [0, 255].  VAR's training transform (utils/data.py) for a square size.
    """
    height, width = size
    least_h, least_w = round(resize_factor * height), round(resize_factor * width)
    if least_h * image.width >= least_w * image.height:  # its height decides, the other side is rounded down
        resized = max(least_w, least_h * image.width // image.height), least_h
    else:
        resized = least_w, max(least_h, least_w * image.height // image.width)
    room_w, room_h = resized[0] - width, resized[1] - height
    if uniforms is None:
        left, top = round(room_w / 2), round(room_h / 2)
    else:
        top, left = int(uniforms[0] * (room_h + 1)), int(uniforms[1] * (room_w + 1))
    if resized[0] * resized[1] > LARGE:  # of a strip that much would be thrown away: only what is cut out is made
        across, down = image.width / resized[0], image.height / resized[1]
        right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
        box = (left * across, top * down, right, bottom)
        image, left, top = image.resize((width, height), Image.Resampling.LANCZOS, box=box), 0, 0
    elif resized != image.size:
        image = image.resize(resized, Image.Resampling.LANCZOS)
    pixels = np.asarray(image)[top : top + height, left : left + width]
    if mirror:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.array(rearrange(pixels, "h w c -> c h w"), order="C"))
