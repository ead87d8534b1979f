"""Pictures in rows and columns, each with its caption below."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from clipa_t5x.data import image_files

PICTURE = 160
_GAP = 8
_LINES = 4
_FONT_SIZE = 11
_LINE_HEIGHT = 14
_BACKGROUND, _TEXT, _EMPTY = "white", "black", (225, 225, 225)


def draw(pictures: Sequence[tuple[bytes | None, str]]) -> Image.Image:
    """Draws a grid, about as wide as it is high.

    Args:
      pictures: encoded image, a JPEG or PNG, and caption of each; where the image is None, has
        too many pixels, or cannot be decoded, a gray square stands.

    Returns:
      An RGB image. Pictures are shrunk, never enlarged, to 160 pixels on their long side.
    """
    columns = max(1, math.ceil(math.sqrt(len(pictures))))
    rows = max(1, math.ceil(len(pictures) / columns))
    cell = (PICTURE + _GAP, PICTURE + _LINES * _LINE_HEIGHT + 2 * _GAP)
    grid = Image.new("RGB", (columns * cell[0] + _GAP, rows * cell[1] + _GAP), _BACKGROUND)
    pen = ImageDraw.Draw(grid)
    font = ImageFont.load_default(_FONT_SIZE)
    for i, (data, caption) in enumerate(pictures):
        left, top = _GAP + i % columns * cell[0], _GAP + i // columns * cell[1]
        picture = _open(data) if data is not None else None
        picture = picture or Image.new("RGB", (PICTURE, PICTURE), _EMPTY)
        # Centred, and on the ground of the caption, which stands at the same height in a row.
        place = (left + (PICTURE - picture.width) // 2, top + PICTURE - picture.height)
        grid.paste(picture, place)
        for number, line in enumerate(wrap(caption, font, PICTURE, _LINES)):
            pen.text((left, top + PICTURE + 4 + number * _LINE_HEIGHT), line, _TEXT, font)
    return grid


def _open(data: bytes) -> Image.Image | None:
    """The picture, shrunk; None where only its decoder finds that it is broken."""
    try:
        with image_files.open_plain(data) as image:
            image.draft("RGB", (2 * PICTURE, 2 * PICTURE))
            picture = image.convert("RGB")
    except Exception:  # Pillow's decoders raise whatever they stumble over.
        return None
    picture.thumbnail((PICTURE, PICTURE))
    return picture


def wrap(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int
) -> list[str]:
    """Breaks a text into at most `most` lines of at most `width` pixels; '...' ends a longer one.

    Lines break between words, within a word only where it is wider than a line.
    """
    lines = [""]
    for word in text.split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
        if len(lines) > most:
            break
    if len(lines) <= most:
        return lines if lines[0] else []
    last = lines[most - 1]
    while last and font.getlength(f"{last}...") > width:
        last = last[:-1]
    return [*lines[: most - 1], f"{last}..."]
