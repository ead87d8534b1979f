"""Data sets that TensorFlow Datasets has prepared, read in place from what lies on the disk.

Neither the network nor the data set's own code is asked: shards, their order and their counts are
in the files that TFDS leaves beside them (dataset_info.json, features.json). A record's fields are
called as TFDS calls its features, 'image' and 'label' for most evaluation sets.
"""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clipa_t5x.data import array_records, record_index, sources, tfrecords
from clipa_t5x.data.shard_formats import ShardFormat
from clipa_t5x.errors import UserError

_FORMATS = {"tfrecord": tfrecords.TFRecord, "array_record": array_records.ArrayRecord}
SPLITS = {"train": "train", "validation": "validation", "test": "test"}


class TFDSSource(sources.ImageTextSource):
    """The splits of a prepared data set."""

    def __init__(
        self,
        tfds_name: str | None,
        data_dir: str,
        fields: sources.RecordFields,
        splits: Mapping[str, str] | None = None,
        index_dir: str | None = None,
        window_bytes: int = sources.DEFAULT_WINDOW_BYTES,
    ):
        """Describes the data; touches no file.

        Args:
          tfds_name: 'name', 'name/config' or 'name/config:version'; None where `data_dir` is the
            folder of the version itself.
          data_dir: where TFDS prepared it, local or gs://.
          fields: which features are read.
          splits: name of a split here -> its name in TFDS, whole splits only; `SPLITS` if None.
          index_dir: where to keep the record index; the default is a folder in `data_dir`.
          window_bytes: size of the shuffle window.
        """
        self._tfds_name = tfds_name
        super().__init__(data_dir, None, fields, splits or SPLITS, index_dir, window_bytes)

    @functools.cached_property
    def _builder(self) -> Any:
        import tensorflow_datasets as tfds  # a second or two, for those who use it

        core: Any = tfds.core
        try:
            if self._tfds_name is None:
                return tfds.builder_from_directory(self._data_dir)
            find = core.read_only_builder.builder_from_files
            return find(self._tfds_name, data_dir=self._data_dir)
        except (core.registered.DatasetNotFoundError, OSError) as error:
            what = f"TFDS data set {self._tfds_name!r}" if self._tfds_name else "TFDS data set"
            raise UserError(
                f"no prepared {what} lies at {self._data_dir}: prepare it there (tfds build, or "
                "download_and_prepare), or set tfds_name and data_dir to one that is."
            ) from error

    def _split(self, split: str) -> Any:
        """What TFDS knows of a split."""
        known = self._builder.info.splits
        name = self._patterns.get(split)
        if name not in known.keys():  # noqa: SIM118  a slice of a split would be found in it
            raise UserError(
                f"split {split!r} ({name}) is not one of the TFDS data set at "
                f"{os.fspath(self._builder.data_dir)}, which has {', '.join(known.keys())}: name "
                "one of these."
            )
        return known[name]

    def num_classes(self, split: str) -> int | None:
        """As TFDS describes the feature with the label, or labels."""
        del split  # the feature is the same in all
        name = self._fields.label or self._fields.labels
        features: Any = self._builder.info.features
        feature = features[name] if name in features.keys() else None  # noqa: SIM118
        # A sequence of labels tells it of its elements.
        return getattr(getattr(feature, "feature", feature), "num_classes", None)

    def _shards(self, split: str) -> tuple[Sequence[str], ShardFormat]:
        # In TFDS's order, which is that of its own readers.
        shards = [os.fspath(path) for path in self._split(split).filepaths]
        file_format = self._builder.info.file_format.value
        if file_format not in _FORMATS:
            raise UserError(
                f"the TFDS data set at {os.fspath(self._builder.data_dir)} is of files of format "
                f"{file_format}: prepare it as {' or '.join(_FORMATS)} (file_format)."
            )
        return shards, _FORMATS[file_format]()

    def _index_name(self, split: str) -> str:
        # Several data sets may lie in one folder.
        folder = re.sub(r"[^\w.]+", "_", self._tfds_name or "")
        return os.path.join(folder, super()._index_name(split))

    def _load_index(self, split: str) -> record_index.RecordIndex:
        """As any source's, and compared with the counts that TFDS wrote down.

        Raises:
          UserError: as `index`; or a shard holds more or fewer records than it should.
        """
        index = super()._load_index(split)
        counts = np.diff(index.ends, prepend=0)
        for path, found, stated in zip(
            index.shards, counts, self._split(split).shard_lengths, strict=True
        ):
            if found != stated:
                problem = index.problems.get(path, "it is another file")
                raise UserError(
                    f"{path} holds {found} records where dataset_info.json says {stated} "
                    f"({problem}): copy the shard again, or prepare the data set anew."
                )
        return index
