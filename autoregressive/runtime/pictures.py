"""Grids of images with captions, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from autoregressive.runtime.files import atomic_write

GAP = 4                 # pixels between pictures
CAPTION_HEIGHT = 15     # pixels
FONT = "DejaVuSans.ttf"  # matplotlib's: it has more letters than Pillow's
FONT_SIZE = 10          # pixels
LEGIBLE_SIDE = 64       # pixels; smaller pictures are enlarged towards it by whole factors


def save_grid(path: str | Path, images: np.ndarray, columns: int,
              captions: Sequence[str] | None = None,
              row_titles: Sequence[str] | None = None) -> None:
    """Saves pictures as one PNG, row by row; small ones are enlarged.

    Args:
        path: the PNG.
        images: (N, P, P, 3) uint8.
        columns: pictures in a row.
        captions: N texts to print above the pictures, cut to their width; or None.
        row_titles: without captions, a text to print above each row; or None.
    """
    images = np.asarray(images)
    scale = max(1, LEGIBLE_SIDE // images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = images.shape[1:3]
    has_captions = captions is not None or row_titles is not None
    caption_height = CAPTION_HEIGHT if has_captions else 0
    step_across = width + GAP                       # pixels from one picture to the next
    step_down = height + caption_height + GAP
    rows = -(-len(images) // columns)
    size = (columns * step_across + GAP, rows * step_down + GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    font = _load_font() if has_captions else None
    for position, image in enumerate(images):
        row, column = divmod(position, columns)
        left = GAP + column * step_across
        upper = GAP + row * step_down
        if captions is not None:
            text = _shorten(str(captions[position]), width, draw, font)
            draw.text((left, upper), text, fill="black", font=font)
        elif row_titles is not None and column == 0:
            draw.text((left, upper), row_titles[row], fill="black", font=font)
        canvas.paste(Image.fromarray(image), (left, upper + caption_height))
    with atomic_write(path) as file:
        canvas.save(file, format="PNG")


def _load_font() -> ImageFont.FreeTypeFont:
    import matplotlib  # here: it takes a fifth of a second

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", FONT), FONT_SIZE)


def _shorten(text: str, width: int, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont) -> str:
    """Returns a text, or as much of it as fits into a width in pixels with an ellipsis."""
    shown = text
    while text and draw.textlength(shown, font=font) > width:
        text = text[:-1]
        shown = text + "…"
    return shown
