"""What an image file says of itself, before a pixel is decoded, and what is made of unusual ones.

Plain JPEGs pass untouched, whatever their size: they are decoded later, at the scale they are used.
What else is in one of `FORMATS` becomes a plain PNG.
"""

import functools
import io
import re
import struct
import warnings
from typing import NamedTuple

from PIL import Image

from clipa_t5x.data.bad_records import BadRecord

JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"
_END_OF_JPEG = b"\xff\xd9"
# Some cameras write a few bytes after the end.
_TAIL_BYTES = 64
# Frame headers of Huffman-coded JPEGs, sequential and progressive: what every decoder reads.
_PROGRESSIVE = 0xC2
_PLAIN_FRAMES = (0xC0, 0xC1, _PROGRESSIVE)
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_WITHOUT_LENGTH = (0x00, 0x01, *range(0xD0, 0xDA))
# PNG's colour types without palette and alpha.
_GRAY, _RGB = 0, 2
# What Pillow may be asked for. It reads more, and for PostScript would start an interpreter.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_SCAN = re.compile(rb"\xff\xda\x00")
# Encoders write ten or so.
MAX_SCANS = 100
_PLAIN_FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 2**26
MIN_SIDE = 2


class ImageFile(NamedTuple):
    """An image that the pipeline decodes.

    Attributes:
      data: a JPEG, or a PNG of 8 bits, gray or RGB.
      height: pixels.
      width: pixels.
      mended: why `data` is not what was given; '' where it is.
    """

    data: bytes
    height: int
    width: int
    mended: str


def check(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageFile:
    """Reads an image's header and makes something plain of what is not.

    Args:
      data: in one of `FORMATS`.
      max_pixels: height times width above which an image is refused undecoded.

    Raises:
      BadRecord: it is not to be used; the reason is one of 'not an image', 'truncated image', 'too
        many pixels', 'too few pixels', 'too many scans', 'unreadable image'.
    """
    if data.startswith(JPEG_START):
        frame = _jpeg_frame(data)
        if frame is None or frame[2] == _PROGRESSIVE:
            _check_scans(data)
        if frame is not None:
            size = frame[:2]
            _check_size(*size, max_pixels)
            if _END_OF_JPEG in data[-_TAIL_BYTES:]:
                return ImageFile(data, *size, "")
    elif data.startswith(PNG_START) and len(data) >= 33:
        width, height, depth, color = struct.unpack(">IIBB", data[16:26])
        _check_size(height, width, max_pixels)
        plain = depth == 8 and color in (_GRAY, _RGB) and b"tRNS" not in data[33:1024]
        if plain and b"IEND" in data[-_TAIL_BYTES:]:
            return ImageFile(data, height, width, "")
    return _mend(data, max_pixels)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this machine's Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadRecord("too many pixels", f"{width} x {height} is above {max_pixels}")
    if min(height, width) < MIN_SIDE:
        raise BadRecord("too few pixels", f"{width} x {height}")


def _check_scans(data: bytes) -> None:
    """Refuses JPEGs of more scans than encoders write: 50 bytes can ask for a pass over all."""
    # Entropy-coded bytes never look like a marker, and a scan's header has at most 14 bytes.
    if (count := len(_SCAN.findall(data))) > MAX_SCANS:
        raise BadRecord("too many scans", f"{count} are above {MAX_SCANS}")


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """(height, width, marker) of a JPEG of one or three colours; None where it is another kind."""
    at, end = 2, len(data) - 9
    while at < end and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # Any number of these may fill the space between segments.
            at += 1
            continue
        if marker in _WITHOUT_LENGTH:  # Decoders go on right behind it: none of a plain header's.
            return None
        if marker in _PLAIN_FRAMES:
            height, width, colors = struct.unpack_from(">HHB", data, at + 5)
            return (height, width, marker) if colors in (1, 3) and height else None
        if marker in _OTHER_FRAMES:
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _mend(data: bytes, max_pixels: int) -> ImageFile:
    """Decodes by Pillow, which tells what is wrong, and writes 8-bit RGB."""
    with warnings.catch_warnings():
        # Pillow warns of large images; the size is looked at below, before pixels are.
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=_formats())
        except Image.DecompressionBombError as error:
            raise BadRecord("too many pixels", str(error)) from error
        except Exception as error:  # Pillow's plugins raise whatever they stumble over.
            reason = "truncated image" if "truncated" in str(error).lower() else "not an image"
            raise BadRecord(reason, f"{type(error).__name__} in the header") from error
        _check_size(image.height, image.width, max_pixels)
        try:
            kind = _kind(image)
            rgb = _to_rgb(image)
        except OSError as error:
            text = str(error)
            reason = "truncated image" if "truncated" in text else "unreadable image"
            raise BadRecord(reason, text) from error
        except Exception as error:
            raise BadRecord("unreadable image", f"{type(error).__name__}: {error}") from error
    buffer = io.BytesIO()
    rgb.save(buffer, "PNG", compress_level=1)
    return ImageFile(buffer.getvalue(), rgb.height, rgb.width, kind)


def _kind(image: Image.Image) -> str:
    """What is unusual about an image, in words for a count."""
    if getattr(image, "is_animated", False):
        return "animated"
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return "alpha"
    if image.mode in ("CMYK", "YCCK"):
        return "CMYK"
    if image.mode.startswith(("I", "F")):
        return "16 bits"
    return f"{image.format} of mode {image.mode}"


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of the first frame, on white where it is transparent."""
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256).convert("L")
    elif image.mode in ("I", "F"):
        # Pillow clips where it converts: wide values are brought to 8 bits first.
        low, high = image.getextrema()
        scale = 256.0 if isinstance(high, int | float) and high > 255 else 1.0
        image = image.convert("F").point(lambda value: value * (1 / scale) + 0).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return image.convert("RGB")


def open_plain(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens what `check` returned, for Pillow to decode.

    Raises:
      BadRecord: there are too many pixels, or too few.
      OSError: it is neither a JPEG nor a PNG. Decoding raises whatever decoders stumble over.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=_PLAIN_FORMATS)
        except Image.DecompressionBombError as error:
            raise BadRecord("too many pixels", str(error)) from error
    _check_size(image.height, image.width, max_pixels)
    return image


@functools.cache
def black() -> bytes:
    """A PNG of 2 x 2 black pixels: what stands where an evaluation's image is bad."""
    buffer = io.BytesIO()
    Image.new("RGB", (MIN_SIDE, MIN_SIDE)).save(buffer, "PNG")
    return buffer.getvalue()
