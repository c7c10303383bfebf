"""Grids of images with captions, as PNG files."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from autoregressive.runtime.files import atomic_write

GAP = 4                 # pixels between pictures
CAPTION_HEIGHT = 15     # pixels
LEGIBLE_SIDE = 64       # pixels; smaller pictures are enlarged towards it by whole factors


def save_grid(path, images, columns, captions=None):
    """Saves images as one PNG, row by row.

    Args:
        path: the PNG.
        images: (N, P, P, 3) uint8.
        columns: pictures in a row.
        captions: N texts to print above the pictures, or None.
    """
    images = np.asarray(images)
    scale = max(1, LEGIBLE_SIDE // images.shape[1])
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = images.shape[1:3]
    top = CAPTION_HEIGHT if captions is not None else 0
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + top + GAP) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=11)
    for position, image in enumerate(images):
        left = GAP + position % columns * (width + GAP)
        upper = GAP + position // columns * (height + top + GAP)
        if captions is not None:
            draw.text((left, upper), _shorten(str(captions[position]), width, draw, font), fill="black", font=font)
        canvas.paste(Image.fromarray(image), (left, upper + top))
    with atomic_write(path) as file:
        canvas.save(file, format="PNG")


def _shorten(text, width, draw, font):
    while text and draw.textlength(text, font=font) > width:
        text = text[:-1]
    return text
