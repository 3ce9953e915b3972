"""The one decoder: whatever people have becomes the picture that they see, or is named."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import zlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin

from mepa_ds.errors import DamagedError
from mepa_ds.images.decoding import decode_image
from mepa_ds.safety.pictures import FORMATS
from tests.data.shard_fixtures import encode, png
from tests.tiny_run import ROOT


def gradient(width: int, height: int) -> Image.Image:
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    return Image.fromarray(ramp.astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(data: bytes, **options: Any) -> NDArray[np.int64]:
    return np.asarray(decode_image(data, "here", **options)).astype(np.int64)


RAMP = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (6, 1))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "I", "RGB", "PA", "YCbCr"])
def test_every_mode_becomes_rgb_of_the_same_picture(mode: str) -> None:
    grey = Image.fromarray(np.repeat(np.linspace(0, 255, 24).astype(np.uint8)[None], 10, 0))
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).convert(mode)
    else:
        image = grey.convert(mode)
    if mode == "YCbCr":  # compressed: Pillow 12.3 cannot read the plain files of this kind that it writes
        data = encode(image, "TIFF", compression="tiff_lzw")
    else:
        data = encode(image, "TIFF" if mode in ("CMYK", "I", "PA") else "PNG")
    decoded = decode_image(data, "here")
    assert decoded.mode == "RGB"
    assert decoded.size == (24, 10)
    tolerance = 255 if mode == "1" else 3
    assert np.abs(np.asarray(decoded)[..., 0].astype(int) - np.asarray(grey)).max() <= tolerance


def test_alpha_is_laid_over_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 255, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(decode_image(encode(image, "PNG"), "here")).tolist() == [[[0, 0, 255], [255, 255, 255]]]


def test_jpeg_in_cmyk() -> None:
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(buffer, "JPEG", quality=95)
    red = np.asarray(decode_image(buffer.getvalue(), "here"))[4, 4]
    assert red[0] > 200
    assert max(red[1:]) < 60


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"This is a text file.", "cannot identify"),
        (b"", "cannot identify"),
        (png(0)[:200], "truncated|broken|cannot"),
        (encode(gradient(64, 64), "JPEG")[:400], "truncated"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, message: str) -> None:
    with pytest.raises(DamagedError, match=f"(?i)cat.jpg: not a readable image: .*({message})"):
        decode_image(data, "cat.jpg")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_pillow_turns_them(orientation: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())))
    np.testing.assert_array_equal(np.asarray(decode_image(buffer.getvalue(), "photo")), np.asarray(expected))


@pytest.mark.filterwarnings("ignore")  # pytest sets our filter aside
def test_a_damaged_note_is_no_damaged_image() -> None:
    """Any byte of the EXIF may be anything."""
    exif = Image.Exif()
    exif[274], exif[271], exif[282] = 6, "camera", 72.0
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "JPEG", exif=exif)
    data, rng = buffer.getvalue(), np.random.default_rng(0)
    start = data.index(b"Exif")
    for _ in range(400):
        changed = bytearray(data)
        for place in rng.integers(start + 6, start + len(exif.tobytes()), 3).tolist():
            changed[place] = int(rng.integers(256))
        assert decode_image(bytes(changed), "photo").size in ((6, 4), (4, 6))


def test_huge_images_are_refused_by_their_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DamagedError, match=r"cat\.jpg: the image is too large"):
        decode_image(png(0, (20, 30)), "cat.jpg")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (RAMP, "TIFF"),
        ((RAMP * 255).round(), "TIFF"),
        ((RAMP * 255).round().astype(np.int32), "TIFF"),
        ((RAMP * 65535).astype(np.int32), "TIFF"),
        ((RAMP * 65535).astype(np.uint16), "TIFF"),
        ((RAMP * 65535).astype(np.uint16), "PNG"),
        ((RAMP * 65535).astype(np.int32), "PPM"),
        ((RAMP * 255).round().astype(np.uint16), "PNG"),
    ],
)
def test_wide_values_keep_all_their_levels(values: NDArray[Any], kind: str) -> None:
    decoded = pixels_of(saved(Image.fromarray(values), kind))
    assert np.abs(decoded - (RAMP * 255)[..., None]).max() <= 1


@pytest.mark.parametrize(
    "values",
    [
        RAMP * 255,
        RAMP * 1.02,
        RAMP - 0.5,
        np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32),
        np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32),
        (RAMP.astype(np.float64) * (2**31 - 1)).astype(np.int32),
        (RAMP * 255 - 3).astype(np.int32),
    ],
)
def test_values_of_an_unknown_scale_are_refused(values: NDArray[Any]) -> None:
    with pytest.raises(DamagedError, match=r"^scan\.tif: its (floats|32-bit integers) run from .* save it as 8- or 16"):
        decode_image(saved(Image.fromarray(values), "TIFF"), "scan.tif")


def test_kinds_of_tiff_that_are_not_read() -> None:
    """Their format is known: the file of 64-bit floats that NumPy's users have, here of a made-up width."""
    data = saved(Image.fromarray(RAMP), "TIFF")
    bits = data.index(struct.pack("<HHIH", 258, 3, 1, 32))
    changed = data[: bits + 8] + struct.pack("<H", 64) + data[bits + 10 :]
    with pytest.raises(DamagedError, match=r"begins as TIFF, but is cut short, damaged or of a kind that is not read"):
        decode_image(changed, "x.tif")


def test_a_dark_pgm_stays_dark() -> None:
    """Its format says what white is."""
    assert pixels_of(saved(Image.fromarray((RAMP * 200).astype(np.int32)), "PPM")).max() == 1


def test_tiffs_whose_zero_is_white() -> None:
    data = saved(Image.fromarray((RAMP * 65535).astype(np.uint16)), "TIFF", tiffinfo={262: 0})
    assert pixels_of(data)[0, [0, -1], 0].tolist() == [255, 0]


def test_lab_is_converted() -> None:
    grey = pixels_of(saved(Image.new("LAB", (4, 4), (255, 128, 128)), "TIFF"))
    red = pixels_of(saved(Image.new("LAB", (4, 4), (128, 200, 128)), "TIFF"))[0, 0]
    assert grey.min() >= 250
    assert red[0] > red[1] + 100


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(bits: int, colour_type: int, rows: bytes, width: int, transparent: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_the_transparent_grey_of_a_png(bits: int, place: int) -> None:
    """In its own units: of 2 bits it is one of four."""
    levels = np.linspace(0, 2**bits - 1, min(2**bits, 8)).round().astype(int).tolist()
    packed = "".join(f"{level:0{bits}b}" for level in levels)
    rows = int(packed.ljust(-(-len(packed) // 8) * 8, "0"), 2).to_bytes(-(-len(packed) // 8), "big")
    data = raw_png(bits, 0, rows, len(levels), struct.pack(">H", levels[place]))
    expected = [[round(level * 255 / (2**bits - 1))] * 3 for level in levels]
    expected[place] = [9, 80, 200]
    assert np.abs(pixels_of(data, background=(9, 80, 200))[0] - expected).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_the_transparent_colour_of_a_png(bits: int) -> None:
    colours = [[200, 7, 7], [200, 7, 8], [0, 0, 0]]
    scale, letter = (1, "B") if bits == 8 else (257, "H")
    rows = b"".join(struct.pack(f">3{letter}", *(value * scale for value in colour)) for colour in colours)
    data = raw_png(bits, 2, rows, 3, struct.pack(">3H", *(value * scale for value in colours[0])))
    assert pixels_of(data)[0].tolist() == [[255, 255, 255], [200, 7, 8], [0, 0, 0]]


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("LA", "PNG"), ("LA", "TIFF"), ("RGBA", "PNG"), ("PA", "TIFF"), ("RGBA", "GIF"), ("RGBA", "WEBP")],
)
def test_transparent_parts_show_the_background(mode: str, kind: str) -> None:
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (2, 0, 4, 2))
    if mode == "PA":
        alpha = image.getchannel("A")
        image = image.convert("P")
        image.putalpha(alpha)
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = pixels_of(saved(image.convert(mode), kind, **options), background=(1, 2, 250))
    assert decoded[0].tolist() == [[1, 2, 250]] * 2 + [[0, 0, 0]] * 2


def test_palettes_with_an_alpha_for_each_entry() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0, 100, 100, 100, 200, 200, 200])
    image.putdata([0, 1, 2])
    data = saved(image, "PNG", transparency=bytes([0, 255, 128]))
    assert pixels_of(data)[0, :, 0].tolist() == [255, 100, pytest.approx(227, abs=1)]


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_of_several_frames(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    assert pixels_of(data)[0, 0, 0] > 240


def test_tiffs_are_turned_once() -> None:
    exif = Image.Exif()
    exif[274] = 6
    noise = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels_of(saved(Image.fromarray(noise), "TIFF", exif=exif)), np.rot90(noise, -1))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("bad"),
        SyntaxError("bad"),
        struct.error("bad"),
        KeyError("bad"),
        zlib.error("bad"),
        OverflowError("bad"),
        EOFError("bad"),
        MemoryError(),
        Image.DecompressionBombError("bad"),
        Image.DecompressionBombWarning("bad"),
        UserWarning("bad"),
    ],
)
def test_whatever_a_plugin_raises_names_the_image(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", fail)
    with pytest.raises(DamagedError, match=r"^cat\.png: (not a readable image|the image is too large): .*(bad|memory)"):
        decode_image(png(0), "cat.png")


@pytest.mark.filterwarnings("ignore")  # pytest sets our filter aside
@pytest.mark.parametrize("kind", FORMATS)
def test_noise_in_any_format_is_an_image_or_named(kind: str) -> None:
    rng, data, said = np.random.default_rng(0), saved(gradient(30, 20), kind), list[str]()
    for _ in range(60):
        changed = bytearray(data)
        for place in rng.integers(0, len(data), 4).tolist():
            changed[place] = int(rng.integers(256))
        try:
            assert decode_image(bytes(changed[: rng.integers(len(data) // 2, len(data) + 1)]), "x").mode == "RGB"
        except DamagedError as error:
            said.append(str(error))
    assert said
    assert all(line.startswith("x: ") and "\n" not in line and " at 0x" not in line for line in said)


def test_other_formats_are_not_tried() -> None:
    """EPS starts Ghostscript; nobody's images are in it."""
    data = saved(gradient(8, 8), "EPS")
    with pytest.raises(DamagedError, match=r"cannot identify its format \(read are JPEG, PNG"):
        decode_image(data, "x.eps")


@pytest.mark.filterwarnings("ignore")
def test_large_images_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the size on from which Pillow warns, in threads too, whose warnings cannot be filtered one by one."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    found = list[str]()

    def decode() -> None:
        try:
            decode_image(png(0, (20, 30)), "cat.png")
        except DamagedError as error:
            found.append(str(error))

    threads = [threading.Thread(target=decode) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["cat.png: the image is too large: 20 x 30 pixels, more than 400; resize it first"] * 2


def test_pillow_says_nothing_by_itself() -> None:
    """Neither of malformed EXIF nor of large images."""
    script = """
import io
from PIL import Image
from mepa_ds.images.decoding import decode_image
Image.MAX_IMAGE_PIXELS = 400
buffer = io.BytesIO()
Image.new("RGB", (20, 19)).save(buffer, "JPEG", exif=b"Exif\\0\\0MM\\0*\\0\\0\\0\\x08\\0\\x05\\x01")
decode_image(buffer.getvalue(), "x")
buffer = io.BytesIO()
Image.new("RGB", (20, 30)).save(buffer, "JPEG")
try:
    decode_image(buffer.getvalue(), "x")
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "x: the image is too large: 20 x 30 pixels, more than 400; resize it first\n"
    assert done.stderr == ""
