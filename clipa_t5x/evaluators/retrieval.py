"""Retrieval of images by their captions, and of captions by their images."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from clipa_t5x.data import input_pipeline
from clipa_t5x.errors import UserError
from clipa_t5x.evaluators import evaluator, similarity

RANKS = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """Recall among the first 1, 5 and 10 in both directions, several captions an image.

    Attributes:
      dataset_cfg: images with captions, of a task with `max_captions`; Karpathy's split of COCO
        and Flickr30k is evaluated with the first five.
    """

    dataset_cfg: input_pipeline.DatasetConfig

    def check(self, num_parts: int = 1) -> None:
        """Reads the data's index.

        Raises:
          UserError: the data are missing or damaged, or the task takes one caption an image.
        """
        self.dataset_cfg.check(num_parts)
        if not input_pipeline.has_all_captions(self.dataset_cfg):
            raise UserError(
                f"the task {self.dataset_cfg.mixture_or_task_name} takes one caption an image: "
                "for retrieval, give it max_captions (of COCO and Flickr30k 5) and a vocabulary."
            )

    def evaluate(
        self, params: Any, embed: evaluator.EmbedFunctions, output_dir: str | None
    ) -> Mapping[str, float]:
        """Recalls in [0, 1] and what they are of; padding and bad records never count.

        'image_to_text_recall_at_k': the share of images of which any own caption is among the k
        most similar of all captions. 'text_to_image_recall_at_k': the share of captions whose own
        image is among the k most similar of all images. Of equal similarities, what stands earlier
        in the data comes first.

        Raises:
          UserError: as `check`; or no image can be read.
        """
        del output_dir
        self.check()
        images, texts, owners = self._embed(params, embed)
        values = recalls(images, texts, owners, embed.layout)
        return {**values, "num_images": len(images), "num_captions": len(texts)}

    def _embed(
        self, params: Any, embed: evaluator.EmbedFunctions
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(images [n, joint], captions [m, joint], int [m] numbers of their images)."""
        images, texts, owners, count = [], [], [], 0
        for _, batch in input_pipeline.eval_batches(self.dataset_cfg, embed.layout):
            valid = evaluator.gather(batch["weights"], embed.layout) > 0
            embedded = evaluator.gather(embed.embed_images(params, batch["images"]), embed.layout)
            images.append(embedded[valid])
            # As many passes as there may be captions: each is a batch of the images' size.
            ids = batch["texts"]
            passes = [embed.embed_text(params, ids[:, i]) for i in range(ids.shape[1])]
            embedded = np.stack([evaluator.gather(x, embed.layout) for x in passes], axis=1)
            present = evaluator.gather(ids[:, :, 0], embed.layout)[valid] > 0
            texts.append(embedded[valid][present])
            owners.append(count + np.nonzero(present)[0])
            count += int(valid.sum())
        if not count:
            raise UserError(
                f"no record of {self.dataset_cfg.mixture_or_task_name} can be read: the log names "
                "what is wrong with the first of them."
            )
        return np.concatenate(images), np.concatenate(texts), np.concatenate(owners)


def recalls(
    images: np.ndarray,
    texts: np.ndarray,
    owners: np.ndarray,
    layout: input_pipeline.BatchLayout,
) -> dict[str, float]:
    """Recalls in both directions, see `Retrieval.evaluate`.

    Args:
      images: float32 [n, joint].
      texts: float32 [m, joint].
      owners: int [m], the number of each text's image.
      layout: whose mesh the work is spread over.
    """
    values = {}
    numbers = np.arange(len(images))
    for name, queries, keys, query_owners, key_owners in (
        ("image_to_text", images, texts, numbers, owners),
        ("text_to_image", texts, images, owners, numbers),
    ):
        _, found = similarity.nearest(queries, keys, max(RANKS), layout)
        hits = key_owners[found] == query_owners[:, None]
        for k in RANKS:
            values[f"{name}_recall_at_{k}"] = float(hits[:, :k].any(axis=1).mean())
    return values
