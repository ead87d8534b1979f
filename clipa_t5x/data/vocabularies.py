"""WordPiece vocabularies (BERT's tokeniser) as SeqIO vocabularies."""

import functools
from collections.abc import Iterable, Sequence

import seqio
import tensorflow as tf
import tensorflow_text as tf_text

from clipa_t5x.errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]")


class BertVocabulary(seqio.Vocabulary):
    """BERT's WordPiece: lower case, accents stripped, greedy longest match.

    The file is read at the first use, so that a configuration can be built where it is absent.
    Texts are encoded without special tokens; `cls_id` is what CLIPA puts in front of them.
    """

    def __init__(self, path: str):
        """Names the vocabulary file: one piece a line, ids by line, [PAD] first."""
        super().__init__()
        self.path = path

    @functools.cached_property
    def pieces(self) -> list[str]:
        """All pieces, by id.

        Raises:
          UserError: the file is missing, or is not a WordPiece vocabulary.
        """
        if not tf.io.gfile.exists(self.path):
            raise UserError(
                f"vocabulary file {self.path} does not exist: set VOCABULARY_PATH to a WordPiece "
                "vocabulary, one piece a line (for the paper's recipes bert-base-uncased's "
                "vocab.txt; the embedded data sets are built with one of their own)."
            )
        with tf.io.gfile.GFile(self.path) as f:
            pieces = f.read().splitlines()
        missing = [token for token in SPECIAL_TOKENS if token not in pieces]
        if missing or pieces[0] != SPECIAL_TOKENS[0]:
            raise UserError(
                f"{self.path} is not a WordPiece vocabulary: its first line must be [PAD] and it "
                f"must hold [UNK] and [CLS] (missing: {missing or 'none'}). Set VOCABULARY_PATH."
            )
        return pieces

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {piece: i for i, piece in enumerate(self.pieces)}

    @functools.cached_property
    def _tokenizer(self) -> tf_text.BertTokenizer:
        _ = self.pieces  # a missing file is the user's error, not a table's
        with tf.init_scope():
            return tf_text.BertTokenizer(self.path, lower_case=True, token_out_type=tf.int32)

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

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        """Ids (int32 [pieces]) of a scalar string; of [n] strings, a ragged [n, pieces]."""
        scalar = s.shape.rank == 0
        pieces = self._tokenizer.tokenize(tf.reshape(s, [-1])).merge_dims(1, 2)
        return pieces[0] if scalar else pieces

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.numpy_function(lambda x: self._decode(x.tolist()), [ids], tf.string)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BertVocabulary) and other.path == self.path

    def __hash__(self) -> int:
        return hash(self.path)
