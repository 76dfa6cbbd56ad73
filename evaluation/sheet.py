"""A picture of judged images: each framed green or red, its prompt under it."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RIGHT, WRONG = (40, 150, 70), (210, 50, 40)
SIDE, FRAME, TEXT_HEIGHT, GAP = 128, 3, 40, 8  # pixels


def verdict_sheet(
    images: Sequence[np.ndarray], prompts: Sequence[str], correct: Sequence[bool], *, columns: int = 8
) -> Image.Image:
    """Images (h, w, 3) uint8 in rows of `columns`, shown at 128 pixels, green frames for accepted ones."""
    width, height = SIDE + 2 * FRAME + GAP, SIDE + 2 * FRAME + TEXT_HEIGHT
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for i, (image, prompt, good) in enumerate(zip(images, prompts, correct, strict=True)):
        left, top = GAP + i % columns * width, GAP + i // columns * height
        draw.rectangle(
            (left, top, left + SIDE + 2 * FRAME - 1, top + SIDE + 2 * FRAME - 1), fill=RIGHT if good else WRONG
        )
        picture = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        sheet.paste(picture, (left + FRAME, top + FRAME))
        lines = textwrap.fill(prompt, 24, max_lines=2, placeholder="...")
        draw.multiline_text((left, top + SIDE + 2 * FRAME + 2), lines, fill=(60, 60, 60), font=font, spacing=2)
    return sheet
