import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_records

from clipa_t5x import evaluation, metrics, optimizers, partitioning, schedules, trainer
from clipa_t5x.data import input_pipeline, preprocessors
from clipa_t5x.errors import UserError


class BrightnessAndStop:
    """An evaluator that embeds two batches and tells what it was given."""

    def __init__(self):
        self.output_dirs = []

    def check(self, num_parts=1):
        pass

    def evaluate(self, params, embed, output_dir):
        self.output_dirs.append(output_dir)
        images = jnp.zeros((8, 16, 16, 3), jnp.uint8)
        images = jax.device_put(images, embed.layout.sharding)
        norms = [np.linalg.norm(embed.embed_images(params, images), axis=-1) for _ in range(2)]
        return {"norm": float(np.mean(norms))}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    directory = tmp_path_factory.mktemp("records")
    tiny_records.write(directory)
    name = tiny_records.task("evaluation_test", directory, preprocessors.squash)
    return tiny_records.config(name, 8, shuffle=False)


@pytest.fixture(scope="module")
def bound(tiny_model, cfg):
    sizes = {"width": 16, "depth": 1, "mlp_dim": 32, "num_heads": 4}
    return trainer.Trainer(
        model=tiny_model(image=sizes, text=sizes),
        optimizer=optimizers.adamw(schedules.warmup_cosine(1e-3, 10)),
        partitioner=partitioning.PjitPartitioner(devices=jax.devices()),
        batch_spec=cfg.batch_spec(),
    )


@pytest.fixture(scope="module")
def params(bound):
    return bound.init_state(0).params


@pytest.fixture
def make_evaluation(bound, cfg, tmp_path):
    def make(evaluators, **kwargs):
        layout = input_pipeline.BatchLayout(partitioning.PjitPartitioner().batch_sharding())
        writer = metrics.MetricsWriter(str(tmp_path))
        return evaluation.Evaluation(
            bound, layout, cfg, evaluators, writer, str(tmp_path), **kwargs
        )

    return make


def test_what_cannot_be_evaluated_is_refused(tmp_path, tiny_model):
    tiny_records.write(tmp_path)
    task = tiny_records.task("evaluation_check_test", tmp_path, text_reduction="syntax")

    def check(batch_size=8, **text):
        cfg, items = tiny_records.config(task, batch_size), {"bright": BrightnessAndStop()}
        partitioner = partitioning.PjitPartitioner()
        evaluation.check(tiny_model(text=text), partitioner, cfg, cfg, items)

    with pytest.raises(UserError, match=r"vocab.tags.json.*does not exist"):
        check()
    tiny_records.write_word_classes(tiny_records.vocabulary(tmp_path))
    check(vocab_size=15)
    with pytest.raises(UserError, match="has 15 pieces and TextTransformer.vocab_size is 14"):
        check(vocab_size=14)
    with pytest.raises(UserError, match="is 9, which the mesh cannot split into 8 .* such as 16"):
        check(batch_size=9)


def written(model_dir):
    lines = (model_dir / "metrics.jsonl").read_text().splitlines()
    return {r["group"]: r["values"] for r in map(json.loads, lines)}


def test_every_value_is_written_and_returned(make_evaluation, params, tmp_path):
    item = BrightnessAndStop()
    evaluate = make_evaluation({"bright": item})
    results = evaluate(3, params, last=False)
    evaluate(4, params, last=True)
    assert item.output_dirs == [None, str(tmp_path)]
    assert results.keys() == {
        "training_eval/evaluation_test/loss",
        "training_eval/evaluation_test/accuracy",
        "inference_eval/bright/norm",
    }
    assert results["inference_eval/bright/norm"] == pytest.approx(1, abs=1e-5)
    flat = {f"{g}/{k}": v for g, values in written(tmp_path).items() for k, v in values.items()}
    assert flat == results


def test_the_loss_is_that_of_all_examples(make_evaluation, bound, cfg, params):
    """13 examples in batches of 8: the second batch counts for its five."""
    layout = make_evaluation({}).layout
    batches = [batch for _, batch in input_pipeline.eval_batches(cfg, layout)]
    losses = [float(bound.eval_step(params, batch)["loss"]) for batch in batches]
    expected = (8 * losses[0] + 5 * losses[1]) / 13
    result = evaluation.eval_loss(bound, layout, cfg, params)
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_an_evaluation_can_be_ended_before_any_batch(make_evaluation, params, tmp_path):
    """Two batches of the loss, two of the evaluator: whichever it is, nothing half is written."""

    class EndedError(Exception):
        pass

    groups = ["training_eval/evaluation_test", "inference_eval/bright"]
    for batches, finished in [(0, []), (1, []), (2, groups[:1]), (3, groups[:1]), (4, groups)]:
        (tmp_path / "metrics.jsonl").write_text("")
        left = batches

        def before_batch():
            nonlocal left
            if left == 0:
                raise EndedError
            left -= 1

        evaluate = make_evaluation({"bright": BrightnessAndStop()}, before_batch=before_batch)
        if batches < 4:
            with pytest.raises(EndedError):
                evaluate(3, params, last=False)
        else:
            evaluate(3, params, last=False)
        assert list(written(tmp_path)) == finished
