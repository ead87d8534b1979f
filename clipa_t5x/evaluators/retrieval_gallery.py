"""Text-to-image retrieval over a small set of captions, with pictures of what was found."""

import base64
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from clipa_t5x.data import input_pipeline, preprocessors
from clipa_t5x.evaluators import evaluator, similarity

FILE_NAME = "gallery.json"


@dataclasses.dataclass(frozen=True)
class RetrievalGallery:
    """Recall of each caption's own image among the first 1 and 5, and a gallery of examples.

    Attributes:
      dataset_cfg: images with captions; `max_examples` keeps the set small.
      num_captions: captions shown.
      num_images: images shown for each.
    """

    dataset_cfg: input_pipeline.DatasetConfig
    num_captions: int = 12
    num_images: int = 5

    def check(self, num_parts: int = 1) -> None:
        """Reads the data's index.

        Raises:
          UserError: the data are missing or damaged.
        """
        self.dataset_cfg.check(num_parts)

    def evaluate(
        self, params: Any, embed: evaluator.EmbedFunctions, output_dir: str | None
    ) -> Mapping[str, float]:
        """Returns recall_at_1 and recall_at_5 in [0, 1]; writes `gallery.json` at the end of a run.

        An image counts as found where it has the caption's very words, so that captions that
        several images share are not held against the model.
        """
        count = input_pipeline.num_examples(self.dataset_cfg)
        images, captions, image_embeddings, text_embeddings = [], [], [], []
        for host_batch, batch in input_pipeline.eval_batches(self.dataset_cfg, embed.layout):
            image_embeddings.append(
                evaluator.gather(embed.embed_images(params, batch["images"]), embed.layout)
            )
            text_embeddings.append(
                evaluator.gather(embed.embed_text(params, batch["text"]), embed.layout)
            )
            images.append(evaluator.gather(batch["images"], embed.layout))
            captions.append(self._all_captions(host_batch, embed.layout))
        names = np.concatenate(captions)[:count]
        scores, ranked = similarity.nearest(
            np.concatenate(text_embeddings)[:count],
            np.concatenate(image_embeddings)[:count],
            max(5, self.num_images),
            embed.layout,
        )
        found = names[ranked] == names[:, None]
        if output_dir is not None and jax.process_index() == 0:
            pictures = np.concatenate(images)[:count]
            self._write(output_dir, names.tolist(), pictures, scores, ranked)
        return {f"recall_at_{k}": float(found[:, :k].any(axis=1).mean()) for k in (1, 5)}

    def _all_captions(
        self, host_batch: input_pipeline.HostBatch, layout: input_pipeline.BatchLayout
    ) -> np.ndarray:
        """Captions (bytes) of the global batch: each process knows those of its own rows."""
        batch_size = self.dataset_cfg.batch_size
        if jax.process_count() == 1:
            return host_batch["caption"]
        width = 256
        own = np.zeros((batch_size, width), np.uint8)
        for row, text in zip(layout.local_rows(batch_size), host_batch["caption"], strict=True):
            data = np.frombuffer(text[:width], np.uint8)
            own[row, : len(data)] = data
        everyone = np.max(np.asarray(multihost_utils.process_allgather(own)), axis=0)
        return np.array([row.tobytes().rstrip(b"\0") for row in everyone], object)

    def _write(
        self,
        output_dir: str,
        names: Sequence[bytes],
        pictures: np.ndarray,
        scores: np.ndarray,
        ranked: np.ndarray,
    ) -> None:
        """Writes the gallery, with captions spread evenly over the set."""
        shown = np.unique(np.linspace(0, len(names) - 1, self.num_captions).astype(int))
        items = [
            {
                "caption": names[i].decode("utf-8", "replace"),
                "results": [
                    {
                        "image": base64.b64encode(preprocessors.encode_png(pictures[j])).decode(),
                        "mime": "image/png",
                        "score": float(score),
                        "caption": names[j].decode("utf-8", "replace"),
                        "match": bool(names[i] == names[j]),
                    }
                    for score, j in zip(scores[i], ranked[i, : self.num_images], strict=False)
                ],
            }
            for i in shown
        ]
        path = epath.Path(output_dir) / FILE_NAME
        path.write_text(json.dumps({"items": items}))
