from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.workloads.image_file import check_image, read_image, white_value

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
Colour = tuple[int, int, int]


def colour(file: Path, *, white: int = 255, at: tuple[int, int] = (4, 4)) -> Colour:
    """Return the colour of a pixel (row, column) of an image read with 8 pixels per side."""
    red, green, blue = read_image(str(file), 8, white=white)[:, at[0], at[1]].tolist()
    return red, green, blue


def saved(image: Image.Image, file: Path, **options: Any) -> Path:
    image.save(file, **options)
    return file


def palette_image(transparent: bytes | None) -> Image.Image:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([*BLUE, *RED])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


@pytest.mark.parametrize(
    ("image", "ending", "expected"),
    [
        (Image.new("RGB", (16, 16), RED), "png", RED),
        (Image.new("L", (16, 16), 100), "png", (100, 100, 100)),
        (Image.new("1", (16, 16), 1), "png", WHITE),
        (palette_image(None), "png", RED),
        (palette_image(b"\xff\x00"), "png", WHITE),
        (Image.new("RGBA", (16, 16), (*RED, 0)), "png", WHITE),
        (Image.new("RGBA", (16, 16), (*RED, 255)), "webp", RED),
        (Image.new("RGBA", (16, 16), (0, 0, 0, 51)), "png", (204, 204, 204)),
        (Image.new("LA", (16, 16), (0, 0)), "png", WHITE),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "tif", RED),
        (Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "jpg", WHITE),
        (Image.new("RGB", (16, 16), GREEN), "bmp", GREEN),
    ],
)
def test_an_image_is_read_in_rgb_on_white(image: Image.Image, ending: str, expected: Colour, tmp_path: Path) -> None:
    file = saved(image, tmp_path / f"a.{ending}", **({"lossless": True} if ending == "webp" else {}))
    assert colour(file) == expected
    assert check_image(str(file)) == 0


def test_a_transparent_colour_of_an_image_without_alpha_is_white(tmp_path: Path) -> None:
    assert colour(saved(Image.new("RGB", (16, 16), RED), tmp_path / "a.png", transparency=RED)) == WHITE
    assert colour(saved(Image.new("L", (16, 16), 7), tmp_path / "b.png", transparency=7)) == WHITE


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize(
    ("orientation", "corner"),
    [(1, (0, 0)), (2, (0, 7)), (3, (7, 7)), (4, (7, 0)), (5, (0, 0)), (6, (0, 7)), (7, (7, 7)), (8, (7, 0))],
)
def test_an_image_is_turned_upright(orientation: int, corner: tuple[int, int], ending: str, tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64))
    image.paste(WHITE, (0, 0, 24, 24))
    exif = Image.Exif()
    exif[0x112] = orientation
    file = saved(image, tmp_path / f"a.{ending}", exif=exif)
    corners = [(row, column) for row in (0, 7) for column in (0, 7)]
    assert [at for at in corners if min(colour(file, at=at)) > 200] == [corner]


def test_mirrored_sides_are_told_from_turned_ones(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64))
    image.paste(RED, (16, 0, 64, 16))  # along the top
    for orientation, at in {5: (6, 0), 8: (1, 0)}.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        assert colour(saved(image, tmp_path / f"{orientation}.png", exif=exif), at=at) == RED


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, and right
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\0\0", b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"]
)
def test_damaged_exif_data_leave_an_image_as_it_is(exif: bytes, tmp_path: Path) -> None:
    file = saved(Image.new("L", (16, 16), 90), tmp_path / "a.jpg", exif=exif)
    assert check_image(str(file)) == 0
    assert colour(file) == (90, 90, 90)


@pytest.mark.parametrize(
    ("largest", "white"), [([0], 255), ([0, 255], 255), ([300, 0], 4095), ([4095], 4095), ([9, 4096], 65535)]
)
def test_white_belongs_to_the_smallest_depth_that_holds_every_image(largest: list[int], white: int) -> None:
    assert white_value(largest) == white


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_an_image_of_16_bits_is_scaled_by_the_value_of_white(ending: str, tmp_path: Path) -> None:
    pixels = np.zeros((16, 16), np.uint16)
    pixels[4:] = 4095
    file = tmp_path / f"a.{ending}"
    Image.fromarray(pixels).save(file)
    assert check_image(str(file)) == 4095
    assert colour(file, white=4095) == WHITE
    assert colour(file, white=65535) == (15, 15, 15)
    assert colour(file, white=255, at=(0, 0)) == (0, 0, 0)


def test_an_image_of_16_bits_of_the_other_byte_order_is_scaled_alike(tmp_path: Path) -> None:
    big_endian = Image.frombytes("I;16B", (16, 16), np.full((16, 16), 2048, ">u2").tobytes())
    file = saved(big_endian, tmp_path / "a.tif")
    assert check_image(str(file)) == 2048
    assert colour(file, white=4095) == (127, 127, 127)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (
            np.full((4, 4), 0.5, np.float32),
            "floating-point pixels of 32 bits, from 0.5 to 0.5: no value is known to be",
        ),
        (np.full((4, 4), 70_000, np.int32), "pixels of 32 bits, from 70000 to 70000: no value is known to be white"),
        (
            np.full((4, 4), -1, np.int32),
            "pixels of 32 bits, from -1 to -1: no value is known to be white; save it with",
        ),
    ],
)
def test_an_image_of_32_bits_is_refused(pixels: np.ndarray, words: str, tmp_path: Path) -> None:
    file = saved(Image.fromarray(pixels), tmp_path / "a.tif")
    with pytest.raises(ValueError, match=re.escape(words)):
        check_image(str(file))


@pytest.mark.parametrize("ending", ["webp", "png", "tif"])
def test_an_animation_is_its_first_frame(ending: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), shade) for shade in (BLUE, GREEN)]
    file = saved(frames[0], tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(file) as image:
        assert getattr(image, "n_frames", 1) == 2
    assert colour(file) == BLUE


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "bmp", "ppm"])
def test_a_file_that_is_cut_short_is_found_without_reading_it_whole(ending: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    file = saved(Image.fromarray(noise), tmp_path / f"a.{ending}")
    assert check_image(str(file)) == 0
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises((OSError, ValueError), match=r"truncated|decoder|end of|not enough|WebP|buffer"):
        check_image(str(file))


def test_a_file_with_something_behind_its_end_can_be_read(tmp_path: Path) -> None:
    file = saved(Image.new("RGB", (16, 16), WHITE), tmp_path / "a.jpg")
    file.write_bytes(file.read_bytes() + b"a short film")
    assert check_image(str(file)) == 0
    assert colour(file) == WHITE


def test_an_image_of_too_many_pixels_is_refused(tmp_path: Path) -> None:
    file = saved(Image.new("L", (16, 16)), tmp_path / "a.png")
    data = bytearray(file.read_bytes())
    data[16:24] = struct.pack(">II", 20_000, 20_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    file.write_bytes(data)
    with pytest.raises(Image.DecompressionBombError, match="400000000 pixels"):
        check_image(str(file))
