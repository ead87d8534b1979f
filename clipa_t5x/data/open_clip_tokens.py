"""Words and pieces as OpenCLIP's tokenizer finds them, for parity with models evaluated there.

OpenCLIP mends a text's encoding and HTML, then hands it to Hugging Face's BERT tokenizer, whose
tables of characters are Unicode 8's. TensorFlow's, by which CLIPA trains, takes texts as they are
and differs in ligatures, fractions, newer punctuation and special tokens that a text spells out.
"""

import functools
import html
import importlib
import re
import string
import unicodedata
from collections.abc import Callable, Mapping

from clipa_t5x.errors import UserError

# What a text that holds one of them is taken apart at, before anything else is looked at.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")
# Of a longer word none is looked for.
_MAX_WORD_LENGTH = 100
# Marks, punctuation and formats of Unicode 9 to 15.1: to the tables of Unicode 8, nothing special.
_UNKNOWN_RANGES = """61d 7fd 890-891 898-89f 8ca-8e2 9fd-9fe a76 afa-aff b55 c04 c3c c77 c84 d00
    d3b-d3c d81 eba ece 180f 1885-1886 1abf-1ace 1b7d-1b7e 1df6-1dfb 2e43-2e4f 2e52-2e5d a82c a8c5
    a8ff a9bd 10d24-10d27 10eab-10ead 10efd-10eff 10f46-10f50 10f55-10f59 10f82-10f89 11070
    11073-11074 110c2 110cd 111cf 1123e 11241 1133b 11438-1143f 11442-11444 11446 1144b-1144f
    1145a-1145b 1145d-1145e 11660-1166c 116b9 1182f-11837 11839-1183b 1193b-1193c 1193e 11943-11946
    119d4-119d7 119da-119db 119e0 119e2 11a01-11a0a 11a33-11a38 11a3b-11a47 11a51-11a56 11a59-11a5b
    11a8a-11a96 11a98-11a9c 11a9e-11aa2 11b00-11b09 11c30-11c36 11c38-11c3d 11c3f 11c41-11c45
    11c70-11c71 11c92-11ca7 11caa-11cb0 11cb2-11cb3 11cb5-11cb6 11d31-11d36 11d3a 11d3c-11d3d
    11d3f-11d45 11d47 11d90-11d91 11d95 11d97 11ef3-11ef4 11ef7-11ef8 11f00-11f01 11f36-11f3a 11f40
    11f42-11f4f 11fff 12ff1-12ff2 13430-13440 13447-13455 16e97-16e9a 16f4f 16fe2 16fe4 1cf00-1cf2d
    1cf30-1cf46 1e000-1e006 1e008-1e018 1e01b-1e021 1e023-1e024 1e026-1e02a 1e08f 1e130-1e136 1e2ae
    1e2ec-1e2ef 1e4ec-1e4ef 1e944-1e94a 1e95e-1e95f"""
# What these three were in Unicode 8.
_CATEGORIES = {"\u1734": "Mn", "\u166d": "Po", "\U000111c9": "Po"}
# Ideographs, which are words of their own. The fifth range begins so late there, too.
_IDEOGRAPH_RANGES = """3400-4dbf 4e00-9fff f900-faff 20000-2a6df 2a700-2b73f 2b740-2b81f 2b920-2ceaf
    2f800-2fa1f"""


def load_ftfy() -> Callable[[str], str]:
    """The function of ftfy that mends texts.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module("ftfy").fix_text
    except ImportError as error:
        raise UserError(
            "TOKENIZATION = 'open_clip' mends texts by ftfy, as OpenCLIP does, which is not "
            "installed: pip install 'clipa_t5x[open_clip]', or set TOKENIZATION = 'clipa'."
        ) from error


def clean(text: str, fix_text: Callable[[str], str]) -> str:
    """A text as OpenCLIP hands it to BERT's tokenizer: mended, without entities or odd spaces.

    Args:
      text: any.
      fix_text: ftfy's, see `load_ftfy`.
    """
    return " ".join(html.unescape(html.unescape(fix_text(text))).split())


class Tokenizer:
    """Greedy longest match of pieces, as Hugging Face's BERT tokenizer without cases or accents."""

    def __init__(self, ids: Mapping[str, int]):
        """Takes a vocabulary, ids by piece, that holds `SPECIAL_TOKENS`."""
        self._ids = ids
        self._longest = max(map(len, ids))
        self._pieces = functools.lru_cache(2**16)(self._find_pieces)

    def words(self, text: str) -> list[list[int]]:
        """Ids of the pieces of every word, as many as there are.

        An unknown word is [UNK]; a special token that the text spells out stands for itself, but
        for [SEP], which OpenCLIP makes padding.
        """
        found: list[list[int]] = []
        for part in _SPECIAL.split(text):
            if part in SPECIAL_TOKENS:
                found.append([self._ids["[PAD]" if part == "[SEP]" else part]])
            else:
                found += [[*self._pieces(word)] for word in split(part)]
        return found

    def _find_pieces(self, word: str) -> tuple[int, ...]:
        unknown = (self._ids["[UNK]"],)
        if len(word) > _MAX_WORD_LENGTH:
            return unknown
        found, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            for end in range(min(len(word), start + self._longest), start, -1):
                piece = self._ids.get(prefix + word[start:end])
                if piece is not None:
                    break
            else:
                return unknown
            found.append(piece)
            start = end
        return tuple(found)


def split(text: str) -> list[str]:
    """Words of a text without cases and accents; marks of punctuation and ideographs are words."""
    return unicodedata.normalize("NFD", text.translate(_VISIBLE)).translate(_WORDS).split()


class _Table(dict[int, str]):
    """A table for `str.translate`, of characters as they occur."""

    def __init__(self, become: Callable[[str], str]):
        super().__init__()
        self._become = become

    def __missing__(self, code: int) -> str:
        self[code] = self._become(chr(code))
        return self[code]


def _bounds(ranges: str) -> list[tuple[str, str]]:
    """First and last characters."""
    ends = [part.split("-") for part in ranges.split()]
    return [(chr(int(end[0], 16)), chr(int(end[-1], 16))) for end in ends]


_UNKNOWN, _IDEOGRAPHS = _bounds(_UNKNOWN_RANGES), _bounds(_IDEOGRAPH_RANGES)


def _is_in(character: str, bounds: list[tuple[str, str]]) -> bool:
    return any(first <= character <= last for first, last in bounds)


def _category(character: str) -> str:
    """Unicode 8's."""
    if _is_in(character, _UNKNOWN):
        return "Lo"
    return _CATEGORIES.get(character) or unicodedata.category(character)


def _visible(character: str) -> str:
    if character in "\t\n\r":
        return " "
    if character == "\N{REPLACEMENT CHARACTER}" or _category(character) in ("Cc", "Cf", "Co"):
        return ""
    if character.isspace():
        return " "
    return f" {character} " if _is_in(character, _IDEOGRAPHS) else character


def _word_part(character: str) -> str:
    category = _category(character)
    if category == "Mn":
        return ""
    # Symbols such as $ and ^ are not punctuation to Unicode, but they are to BERT.
    if category[0] == "P" or character in string.punctuation:
        return f" {character} "
    return character.lower()


_VISIBLE, _WORDS = _Table(_visible), _Table(_word_part)
