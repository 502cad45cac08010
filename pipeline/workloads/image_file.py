"""Read one image file as people see it: upright, transparent pixels on white, 8 bits per channel."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

BITS = (8, 12, 16)
"""Depths of grey pixels that files of 16 bits hold."""
END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
"""Pillow's name of a format to the last bytes of a whole file."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what turns an image upright. `ImageOps.exif_transpose` also writes the other EXIF data anew, and
raises where a camera wrote them wrong."""


def check_image(file: str) -> int:
    """Check that an image can be read.

    Pixels are decoded only where the header and the last bytes do not show that the file is whole.

    Returns:
        The largest pixel value of an image of more than 8 bits per channel, else 0.

    Raises:
        Exception: The image cannot be read; decoders raise exceptions of many classes.
    """
    with Image.open(file) as image:
        if _is_deep(image):
            return int(_deep_pixels(image).max())
        if not _is_whole(file, image.format or ""):
            image.load()
    return 0


def white_value(largest: Sequence[int]) -> int:
    """Return the pixel value that is white in images of 16 bits, given the largest value of each.

    The value belongs to the smallest depth that holds every image: cameras and scanners of 12 bits write files of 16.
    """
    return next((1 << bits) - 1 for bits in BITS if max(largest) < 1 << bits)


def read_image(file: str, size: int, *, white: int) -> Tensor:
    """Read the middle square of an image, resized; the first frame if the image is animated.

    Args:
        file: Path of the image.
        size: Pixels per side of the result.
        white: The value of white in an image of more than 8 bits per channel.

    Returns:
        Red, green and blue (channel, height, width) of uint8.

    Raises:
        Exception: The image cannot be read.
    """
    with Image.open(file) as image:
        image.draft("RGB", (2 * size, 2 * size))  # decodes a JPEG no larger than needed
        pixels = pil_to_tensor(_in_colour(_upright(image), white))
    side = min(pixels.shape[1:])
    square: Tensor = resize(center_crop(pixels, [side, side]), [size, size])
    return square


def _upright(image: Image.Image) -> Image.Image:
    """Return an image turned as its EXIF data say; as it is where they cannot be read."""
    image.load()  # some formats have their EXIF data behind the pixels, and TIFF images are turned by Pillow
    with contextlib.suppress(Exception):
        return image.transpose(TURNS[image.getexif()[ExifTags.Base.Orientation]])
    return image


def _in_colour(image: Image.Image, white: int) -> Image.Image:
    """Return an image in RGB, its transparent pixels on white."""
    if _is_deep(image):
        image = Image.fromarray((_deep_pixels(image) * 255 // white).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    """Say whether an image has more than 8 bits per channel; Pillow would turn pixels above 255 white."""
    return image.mode.startswith(("I", "F"))


def _deep_pixels(image: Image.Image) -> npt.NDArray[np.int64]:
    """Return the pixels (height, width) of an image of 16 bits.

    Raises:
        ValueError: The image has 32 bits, so nothing says which value is white.
    """
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() >= 1 << max(BITS):
        kind = "floating-point pixels" if image.mode == "F" else "pixels"
        found = f"from {pixels.min():g} to {pixels.max():g}"
        raise ValueError(f"{kind} of 32 bits, {found}: no value is known to be white; save it with 8 bits")
    return pixels.astype(np.int64)


def _is_whole(file: str, format: str) -> bool:
    """Say whether the last bytes of a file are those that end its format."""
    mark = END_MARKS.get(format)
    if mark is None:
        return False
    with Path(file).open("rb") as stream:
        stream.seek(-len(mark), os.SEEK_END)
        return stream.read() == mark
