"""WordPiece vocabularies (BERT's tokeniser) as SeqIO vocabularies."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_text as tf_text

from clipa_t5x.data import open_clip_tokens, text_files, word_classes
from clipa_t5x.errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]")
# How texts become ids, and what stands behind their pieces: nothing, or the padding that OpenCLIP
# has where BERT has [SEP].
TOKENIZATIONS = {"clipa": 0, "open_clip": 1}


@functools.cache
def _tokenize_fn(path: str) -> Any:
    """Strings [n] to ragged ids [n, words, pieces]; traced once, as tracing takes seconds."""
    with tf.init_scope():
        tokenizer = tf_text.BertTokenizer(path, lower_case=True, token_out_type=tf.dtypes.int32)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.dtypes.string)], autograph=False)
    def tokenize(texts: tf.Tensor) -> Any:
        return tokenizer.tokenize(texts)

    return tokenize


class BertVocabulary(seqio.Vocabulary):
    """BERT's WordPiece: lower case, accents stripped, greedy longest match.

    The file is read at the first use, so that a configuration can be built where it is absent.
    Texts are encoded without special tokens; `cls_id` is what CLIPA puts in front of them.
    """

    def __init__(self, path: str, tokenization: str = "clipa"):
        """Names the vocabulary file: one piece a line, ids by line, [PAD] first.

        Args:
          path: of the file.
          tokenization: 'clipa', texts as they are, by TensorFlow, as CLIPA's models are trained;
            'open_clip', as OpenCLIP's tokenizer of the same models, see `open_clip_tokens`, which
            also leaves the last position to padding.

        Raises:
          UserError: there is no such tokenization.
        """
        super().__init__()
        if tokenization not in TOKENIZATIONS:
            raise UserError(
                f"TOKENIZATION is {tokenization!r}; it must be one of {list(TOKENIZATIONS)}."
            )
        self.path, self.tokenization = path, tokenization

    @functools.cached_property
    def pieces(self) -> list[str]:
        """All pieces, by id.

        Raises:
          UserError: the file is missing, absurdly large, or is not a WordPiece vocabulary.
        """
        if not tf.io.gfile.exists(self.path) or tf.io.gfile.isdir(self.path):
            raise UserError(
                f"vocabulary file {self.path} does not exist: set VOCABULARY_PATH to a WordPiece "
                "vocabulary, one piece a line (for the paper's recipes bert-base-uncased's "
                "vocab.txt; the embedded data sets are built with one of their own)."
            )
        text = text_files.read(self.path, "vocabulary").decode("utf-8", "replace")
        # Lines as TensorFlow counts them: a piece may hold what Unicode calls a line separator.
        pieces = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
        ids = {piece: i for i, piece in enumerate(pieces)}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing or ids[SPECIAL_TOKENS[0]] != 0:
            raise UserError(
                f"{self.path} is not a WordPiece vocabulary: its first line must be [PAD] and it "
                f"must hold [UNK] and [CLS] (missing: {missing or 'none'}). Set VOCABULARY_PATH."
            )
        if "" in ids or len(ids) < len(pieces):
            line = next(i for i, piece in enumerate(pieces) if not piece or ids[piece] != i)
            raise UserError(
                f"{self.path} is not a WordPiece vocabulary: line {line + 1} is "
                f"{'empty' if not pieces[line] else f'{pieces[line]!r}, which occurs again'}. Ids "
                "are line numbers, so every line must hold a piece of its own. Set VOCABULARY_PATH."
            )
        return pieces

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}

    @functools.cached_property
    def word_classes(self) -> np.ndarray:
        """The class of every piece, int64 [pieces], from the table beside the file.

        Raises:
          UserError: a file is missing or damaged, or the table is another vocabulary's.
        """
        return word_classes.read(self.path, len(self.pieces))

    @property
    def bos_id(self) -> int:
        """Id of [CLS], which stands first in every sequence."""
        return self.cls_id

    @property
    def cls_id(self) -> int:
        """Id of [CLS]."""
        return self._ids["[CLS]"]

    @property
    def eos_id(self) -> int | None:
        """None: CLIPA's sequences have no end token."""
        return None

    @property
    def unk_id(self) -> int:
        """Id of [UNK]."""
        return self._ids["[UNK]"]

    @property
    def _base_vocab_size(self) -> int:
        return len(self.pieces)

    def _encode(self, s: str) -> Sequence[int]:
        return self._encode_tf(tf.constant(s)).numpy().tolist()

    def _decode(self, ids: Iterable[int]) -> str:
        words = [self.pieces[i] for i in ids if i not in (self.pad_id, self.cls_id)]
        return " ".join(words).replace(" ##", "")

    def room(self, length: int) -> int:
        """Most pieces of a text in `length` positions, of which [CLS] has the first."""
        return max(length - 1 - TOKENIZATIONS[self.tokenization], 0)

    def words_tf(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """Ids of the pieces of every word, int32 [n, (words), (pieces)], of strings [n].

        No word is without pieces: an unknown one is [UNK].

        Raises:
          UserError: the file is missing, or is not a WordPiece vocabulary; or of 'open_clip', ftfy
            is missing.
        """
        _ = self.pieces  # a missing file is the user's error, not a table's
        if self.tokenization == "clipa":
            return _tokenize_fn(self.path)(texts)
        _ = self._open_clip_words
        ids, pieces, words = tf.numpy_function(
            self._flat_words, [texts], [tf.int32, tf.int64, tf.int64]
        )
        for flat in (ids, pieces, words):
            flat.set_shape([None])
        return tf.RaggedTensor.from_nested_row_lengths(  # pyright: ignore[reportAttributeAccessIssue]
            ids, [words, pieces]
        )

    @functools.cached_property
    def _open_clip_words(self) -> Callable[[str], list[list[int]]]:
        missing = [token for token in open_clip_tokens.SPECIAL_TOKENS if token not in self._ids]
        if missing:
            raise UserError(
                f"{self.path} has no {', '.join(missing)}, which TOKENIZATION = 'open_clip' looks "
                "for in texts: set VOCABULARY_PATH to BERT's, or TOKENIZATION = 'clipa'."
            )
        tokenizer = open_clip_tokens.Tokenizer(self._ids)
        fix_text = open_clip_tokens.load_ftfy()
        return lambda text: tokenizer.words(open_clip_tokens.clean(text, fix_text))

    def _flat_words(self, texts: np.ndarray) -> tuple[np.ndarray, ...]:
        """(ids, pieces of each word, words of each text) of UTF-8 strings [n]."""
        rows = [self._open_clip_words(text.decode("utf-8", "replace")) for text in texts]
        words = [word for row in rows for word in row]
        return (
            np.array([piece for word in words for piece in word], np.int32),
            np.array([len(word) for word in words], np.int64),
            np.array([len(row) for row in rows], np.int64),
        )

    def _encode_tf(self, s: tf.Tensor) -> Any:
        """Ids (int32 [pieces]) of a scalar string; of [n] strings, a ragged [n, pieces]."""
        scalar = s.shape.rank == 0
        pieces = self.words_tf(tf.reshape(s, [-1])).merge_dims(1, 2)
        return pieces[0] if scalar else pieces

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        """Texts (string [...]) of ids (int32 [..., length])."""

        def decode(ids: np.ndarray) -> np.ndarray:
            rows = ids.reshape(int(np.prod(ids.shape[:-1])), ids.shape[-1]).tolist()
            return np.array([self._decode(row) for row in rows], object).reshape(ids.shape[:-1])

        texts = tf.numpy_function(decode, [ids], tf.string)
        texts.set_shape(ids.shape[:-1])
        return texts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BertVocabulary) and other._identity == self._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    @property
    def _identity(self) -> tuple[str, str]:
        return self.path, self.tokenization
