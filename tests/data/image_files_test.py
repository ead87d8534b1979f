import io
import struct
import subprocess

import numpy as np
import pytest
import tensorflow as tf
import tiny_records
from PIL import Image

from clipa_t5x.data import image_files
from clipa_t5x.data.bad_records import BadRecord

PICTURE = Image.fromarray(tiny_records.picture(5, 40, 50))


def encode(image, form, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, form, **kwargs)
    return buffer.getvalue()


JPEG, PNG = encode(PICTURE, "JPEG", quality=95), encode(PICTURE, "PNG")


def jpeg_that_says(height, width):
    raw = bytearray(JPEG)
    at = raw.index(b"\xff\xc0")
    raw[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(raw)


@pytest.mark.parametrize("data", [
    JPEG, PNG, encode(PICTURE, "JPEG", progressive=True), encode(PICTURE.convert("L"), "JPEG"),
    encode(PICTURE.convert("L"), "PNG"), encode(PICTURE, "JPEG", exif=b"Exif\0\0" + bytes(9000)),
    JPEG + b"\n\0", encode(PICTURE, "JPEG", comment=b"\xff\xc0 is no frame here"),
])  # fmt: skip
def test_plain_images_pass_untouched(data):
    found = image_files.check(data)
    assert found.data is data
    assert (found.height, found.width, found.mended) == (40, 50, "")
    assert tf.io.decode_image(data, channels=3, expand_animations=False).shape == (40, 50, 3)


@pytest.mark.parametrize("data, kind, tolerance", [
    (encode(PICTURE.convert("CMYK"), "JPEG", quality=95), "CMYK", 12),
    (encode(PICTURE.convert("RGBA"), "PNG"), "alpha", 0),
    (encode(PICTURE, "WEBP", lossless=True), "WEBP of mode RGB", 0),
    (encode(PICTURE, "BMP"), "BMP of mode RGB", 0),
    (encode(PICTURE, "TIFF"), "TIFF of mode RGB", 0),
    (encode(PICTURE.convert("P", palette=Image.Palette.ADAPTIVE), "GIF"), "GIF of mode P", 30),
    (encode(PICTURE, "GIF", save_all=True, append_images=[PICTURE.rotate(90)]), "animated", 60),
])  # fmt: skip
def test_unusual_images_become_plain(data, kind, tolerance):
    found = image_files.check(data)
    assert (found.height, found.width, found.mended) == (40, 50, kind)
    pixels = np.asarray(Image.open(io.BytesIO(found.data)))
    assert pixels.shape == (40, 50, 3)
    assert np.abs(pixels.astype(int) - np.asarray(PICTURE)).mean() <= tolerance / 4
    # What comes out passes untouched.
    assert image_files.check(found.data).data is found.data


def test_sixteen_bits_keep_their_brightness():
    grey = np.linspace(0, 65535, 2000).reshape(40, 50).astype(np.uint16)
    found = image_files.check(encode(Image.fromarray(grey), "PNG"))
    assert found.mended == "16 bits"
    pixels = np.asarray(Image.open(io.BytesIO(found.data))).astype(int)
    assert np.abs(pixels - (grey[..., None] // 256)).max() <= 1


def test_what_is_transparent_becomes_white():
    image = PICTURE.convert("RGBA")
    image.putalpha(0)
    found = image_files.check(encode(image, "PNG"))
    assert np.asarray(Image.open(io.BytesIO(found.data))).min() == 255


@pytest.mark.parametrize("data, reason", [
    (b"", "not an image"), (b"hello, world", "not an image"), (b"<html></html>", "not an image"),
    (b"\xff\xd8\xff\xe0", "not an image"), (JPEG[:-2], "truncated image"),
    (JPEG[:600], "truncated image"), (JPEG[:700], "truncated image"),
    (PNG[: len(PNG) // 2], "truncated image"), (b"\x89PNG\r\n\x1a\n", "not an image"),
    (encode(PICTURE.resize((1, 1)), "JPEG"), "too few pixels"),
    (encode(PICTURE.resize((1, 1)), "PNG"), "too few pixels"),
    (jpeg_that_says(40_000, 40_000), "too many pixels"),
    (PNG[:16] + struct.pack(">II", 40_000, 40_000) + PNG[24:], "too many pixels"),
    (jpeg_that_says(0, 50), "not an image"),
])  # fmt: skip
def test_bad_images_are_refused_with_a_reason(data, reason):
    with pytest.raises(BadRecord) as caught:
        image_files.check(data)
    assert caught.value.reason == reason


def test_the_cap_is_the_users():
    assert image_files.check(JPEG, 2000).data is JPEG
    with pytest.raises(BadRecord, match="50 x 40 is above 1999"):
        image_files.check(JPEG, 1999)


@pytest.mark.parametrize("seed", range(3))
def test_rubbish_never_raises_anything_else(seed):
    rng = np.random.default_rng(seed)
    for _ in range(150):
        raw = bytearray(JPEG if rng.random() < 0.5 else PNG)
        for at in rng.integers(0, len(raw), rng.integers(1, 20)):
            raw[at] = rng.integers(256)
        data = bytes(raw[: rng.integers(1, len(raw) + 1)])
        try:
            found = image_files.check(data)
        except BadRecord as error:
            assert error.reason
        else:
            assert found.height >= 2 and found.width >= 2


# A program in PostScript, which Pillow would have Ghostscript run.
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 40\n(canary) (w) file closefile\n"


def test_no_program_is_started_for_an_image(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"{args} was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(BadRecord) as caught:
        image_files.check(POSTSCRIPT)
    assert caught.value.reason == "not an image"


def test_every_format_that_pillow_may_read_is_decoded_by_pillow():
    # Formats that start programs, or that nobody keeps photos in, are not among them.
    assert not {"EPS", "PSD", "WMF", "FPX", "PDF"} & set(image_files.FORMATS)
    for form in image_files.FORMATS:
        data = encode(PICTURE, form)
        assert (image_files.check(data).height, image_files.check(data).width) == (40, 50)


def test_a_stray_marker_cannot_hide_the_size():
    # Decoders go on right behind a marker without a length; who reads a length there jumps over the
    # true frame to one within a comment.
    true = jpeg_that_says(16_000, 16_000)
    frame = true.index(b"\xff\xc0")
    small = JPEG[JPEG.index(b"\xff\xc0") :]
    for marker in (b"\xff\x01", b"\xff\xd0", b"\xff\xd8"):
        start = true[:frame] + marker + true[frame:-2]
        landing = frame + 2 + int.from_bytes(b"\xff\xc0", "big")
        comment = b"\xff\xfe\xff\xff".ljust(landing - len(start), b"\0") + small
        with pytest.raises(BadRecord):
            image_files.check(start + comment)


def progressive(size, num_scans):
    """A progressive JPEG whose last scan but one, of a few bytes, is there many times."""
    data = encode(Image.new("RGB", (size, size), (200, 10, 10)), "JPEG", progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    again = data[scans[-2] : scans[-1]] * (num_scans - len(scans))
    return data[: scans[-1]] + again + data[scans[-1] :]


def test_scans_that_only_take_time_are_refused():
    assert image_files.check(progressive(64, image_files.MAX_SCANS)).height == 64
    data = progressive(64, image_files.MAX_SCANS + 1)
    assert tf.io.decode_image(data).shape == (64, 64, 3)  # the decoder would go through them all
    with pytest.raises(BadRecord, match="too many scans: 101 are above 100"):
        image_files.check(data)


def test_animations_are_told_without_reading_all_frames():
    frames = [PICTURE.rotate(i) for i in range(5)]
    data = encode(PICTURE, "GIF", save_all=True, append_images=frames)
    cut = data[: len(data) * 3 // 4]  # What follows the second frame does not matter.
    assert image_files.check(cut).mended == "animated"


def test_open_plain_has_the_bounds_of_check():
    assert image_files.open_plain(JPEG).size == (50, 40)
    with pytest.raises(BadRecord, match="too many pixels"):
        image_files.open_plain(JPEG, 1999)
    with pytest.raises(BadRecord, match="too many pixels"):
        image_files.open_plain(jpeg_that_says(60_000, 60_000))
    for other in (b"", POSTSCRIPT, encode(PICTURE, "BMP")):
        with pytest.raises(OSError):
            image_files.open_plain(other)
