"""Which pieces of a vocabulary are nouns, adjectives or verbs: a table beside the vocabulary.

CLIPA's syntax mask asks for no more than one class a piece, each judged by itself, so a table of
small integers serves every caption. It is an input like the vocabulary: made once, by a tagger that
the file names, and refused beside any other vocabulary.
"""

import collections
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from clipa_t5x.data import text_files
from clipa_t5x.errors import UserError

# In the order in which words are kept (Li et al., 2023, section 3).
NOUN, ADJECTIVE, VERB, OTHER = 1, 2, 3, 4
NAMES = {"noun": NOUN, "adjective": ADJECTIVE, "verb": VERB, "other": OTHER}
# What the Penn Treebank's tags of a class begin with.
_TAG_PREFIXES = {"NN": NOUN, "JJ": ADJECTIVE, "VB": VERB}


class Tagger(NamedTuple):
    """A way to find the parts of speech of a text.

    Attributes:
      name: the library's.
      version: its version: another may tag otherwise.
      tag: function of a text; returns the Penn tags of its tokens.
    """

    name: str
    version: str
    tag: Callable[[str], Sequence[str]]


def textblob_tagger() -> Tagger:
    """The lexicon and suffix rules of textblob, which come with its package.

    Raises:
      UserError: textblob is not installed.
    """
    try:
        from textblob import en
    except ImportError as error:
        raise UserError(
            "--tagger=textblob needs textblob, which is not installed: "
            "pip install 'clipa_t5x[tags]'"
        ) from error

    def tag(text: str) -> list[str]:
        # A piece is one token as it is; textblob's tokeniser would split marks off.
        return [tag for _, tag in en.tag(text, tokenize=False)]

    return Tagger("textblob", metadata.version("textblob"), tag)


def nltk_tagger() -> Tagger:
    """NLTK's tokeniser and averaged perceptron, CLIPA's choice; nothing is downloaded.

    Raises:
      UserError: NLTK, or the data that it is trained on, is not installed.
    """
    try:
        import nltk

        nltk.pos_tag(nltk.word_tokenize("a photo"))
    except ImportError as error:
        raise UserError(
            "--tagger=nltk needs NLTK, which is not installed: pip install nltk"
        ) from error
    except LookupError as error:
        raise UserError(
            "--tagger=nltk needs NLTK's data, which are not installed: python -m nltk.downloader "
            "punkt_tab averaged_perceptron_tagger_eng, or take --tagger=textblob"
        ) from error

    def tag(text: str) -> list[str]:
        return [tag for _, tag in nltk.pos_tag(nltk.word_tokenize(text))]

    return Tagger("nltk", metadata.version("nltk"), tag)


TAGGERS: dict[str, Callable[[], Tagger]] = {"textblob": textblob_tagger, "nltk": nltk_tagger}


def table_path(vocabulary_path: str) -> str:
    """Where a vocabulary's table lies: vocab.txt's is vocab.tags.json beside it."""
    return f"{vocabulary_path.removesuffix('.txt')}.tags.json"


def class_of(tags: Sequence[str]) -> int:
    """The class of a piece from its tokens' Penn tags: the last one's, as CLIPA takes it."""
    prefix = tags[-1][:2] if tags else ""
    return _TAG_PREFIXES.get(prefix, OTHER)


def classify(pieces: Iterable[str], tagger: Tagger) -> list[int]:
    """The class of every piece, each tagged by itself."""
    return [class_of(tagger.tag(piece)) for piece in pieces]


def classify_listed(pieces: Iterable[str], words: Mapping[str, Sequence[str]]) -> list[int]:
    """The class of every piece from lists of words by the class's name; the rest are others."""
    listed = {word: NAMES[name] for name, members in words.items() for word in members}
    return [listed.get(piece, OTHER) for piece in pieces]


def counts(classes: Iterable[int]) -> dict[str, int]:
    """How many pieces are of each class, by the class's name."""
    found = collections.Counter(classes)
    return {name: found[value] for name, value in NAMES.items()}


def write(vocabulary_path: str, classes: Sequence[int], tagger: str, version: str) -> None:
    """Writes a vocabulary's table beside it.

    Args:
      vocabulary_path: the vocabulary, local or gs://.
      classes: of every piece, by id.
      tagger: what found them.
      version: of the tagger.
    """
    table = {
        "tagger": tagger,
        "tagger_version": version,
        "vocabulary_size": len(classes),
        "vocabulary_sha256": _sha256(vocabulary_path),
        "classes": list(classes),
    }
    epath.Path(table_path(vocabulary_path)).write_text(json.dumps(table) + "\n")


def read(vocabulary_path: str, vocabulary_size: int) -> np.ndarray:
    """Reads a vocabulary's table.

    Args:
      vocabulary_path: the vocabulary, local or gs://.
      vocabulary_size: pieces in it.

    Returns:
      int64 [vocabulary], the class of every piece by id.

    Raises:
      UserError: the table is missing, damaged, or another vocabulary's.
    """
    path = table_path(vocabulary_path)
    remedy = f"make it with python -m clipa_t5x.data.build tags --vocabulary_path={vocabulary_path}"
    if not epath.Path(path).exists():
        raise UserError(
            f"TEXT_REDUCTION is 'syntax' and {path}, the classes of the vocabulary's words, does "
            f"not exist: {remedy}"
        )
    table = _parse(text_files.read(path, "table of word classes"))
    if table is None:
        raise UserError(f"{path} is no table of word classes: {remedy} again")
    sizes = {table["vocabulary_size"], len(table["classes"])}
    if sizes != {vocabulary_size}:
        raise UserError(
            f"{path} is of {len(table['classes'])} pieces, and {vocabulary_path} has "
            f"{vocabulary_size}: {remedy} again"
        )
    if table["vocabulary_sha256"] != (found := _sha256(vocabulary_path)):
        raise UserError(
            f"{path} was made for a vocabulary of SHA-256 {table['vocabulary_sha256']}, and that "
            f"of {vocabulary_path} is {found}: {remedy} again"
        )
    return np.asarray(table["classes"], np.int64)


def _parse(text: bytes) -> dict[str, Any] | None:
    """A table's contents; None where the text is no table."""
    try:
        table = json.loads(text)
        fits = set(table["classes"]) <= set(NAMES.values())
        fits = fits and isinstance(table["vocabulary_size"], int)
        fits = fits and isinstance(table["vocabulary_sha256"], str)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return table if fits else None


def _sha256(path: str) -> str:
    return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()
