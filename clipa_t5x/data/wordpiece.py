"""A WordPiece vocabulary made from the texts of a small data set.

A data set with a few hundred words needs no learned subwords: every word becomes a token of its
own, and single characters stand by so that words of other texts still split instead of becoming
[UNK]. The words are found as BERT's basic tokeniser finds them: that is what the vocabulary's
readers apply before they look a word up.
"""

import os
import string
import unicodedata
from collections.abc import Iterable

# [PAD] is token 0 so that zero padding needs no knowledge of the vocabulary.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CHARACTERS = string.ascii_lowercase + string.digits


def basic_tokenize(text: str) -> list[str]:
    """Splits a text into lower-cased words and single punctuation marks.

    Args:
      text: any text. Accents are dropped, control characters ignored.

    Returns:
      The words and marks in order; none of them holds white space.
    """
    spaced: list[str] = []
    for character in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(character)
        if character.isspace():
            spaced.append(" ")
        elif category in ("Mn", "Cc", "Cf"):
            continue
        elif _stands_alone(character, category):
            spaced.append(f" {character} ")
        else:
            spaced.append(character)
    return "".join(spaced).split()


def _stands_alone(character: str, category: str) -> bool:
    # Symbols such as $ and ^ are not punctuation to Unicode, but they are to BERT.
    return (
        character in string.punctuation
        or category.startswith("P")
        or unicodedata.name(character, "").startswith("CJK")
    )


def build_vocabulary(texts: Iterable[str]) -> list[str]:
    """Makes the vocabulary in which every word of the texts is one token.

    Args:
      texts: captions, class names, templates.

    Returns:
      The tokens by id: the special tokens, the characters a-z and 0-9, their continuations
      (`##a` ...), ASCII punctuation, then the remaining words in sorted order. No token occurs
      twice, and the order of the texts does not matter.
    """
    fixed: list[str] = [
        *SPECIAL_TOKENS,
        *_CHARACTERS,
        *(f"##{character}" for character in _CHARACTERS),
        *string.punctuation,
    ]
    words = {word for text in texts for word in basic_tokenize(text)}
    return fixed + sorted(words.difference(fixed))


def write_vocabulary(path: str | os.PathLike[str], tokens: Iterable[str]) -> None:
    """Writes one token per line, UTF-8: the line number, from 0, is the id.

    Args:
      path: the file to write.
      tokens: the tokens by id.
    """
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{token}\n" for token in tokens)
