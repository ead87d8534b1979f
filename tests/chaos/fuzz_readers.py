"""The project's readers of what strangers wrote, by kind of input.

A reader gets a folder and reads all that is in it, as training, evaluation, conversion and the
report would. It returns what was bad among it, in words, or '': records that are counted and left
out are no errors.
"""

import functools
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tensorflow as tf
import tiny_records
from chaos import fuzz_inputs, fuzz_weights

from clipa_t5x import (
    checkpoints,
    gin_utils,
    models,
    partitioning,
    report,
    run_history,
    stage_handover,
    train,
)
from clipa_t5x.data import (
    formats,
    image_files,
    input_pipeline,
    picture_grid,
    preprocessors,
    prompts,
    record_index,
    shard_conversion,
    shard_formats,
    sources,
    vocabularies,
)
from clipa_t5x.data.bad_records import BadRecord
from clipa_t5x.evaluators import clip_benchmark, evaluator
from clipa_t5x.weights import array_files

_ROOT = f"{train.__name__}.train"
_MOST_RECORDS = 40
_CAPTIONS = {"txt": 1.0}
_CAPTIONS_OF_TARS = {"txt": 0.5, "json:caption": 0.5}
_OPTIONS = shard_conversion.Options(
    image_key="jpg;image", caption_keys=("txt", "json:caption", "json:more"), short_side=16
)


def _gin(folder):
    recipe = (folder / "recipe").read_text()
    search_paths = [str(folder), str(fuzz_inputs.GIN)]
    bindings = ["MODEL_DIR = 'unused'", "DATA_DIR = 'unused'", "VOCABULARY_PATH = 'unused'"]
    bindings = bindings[: 1 if recipe.startswith(("shapes", "digits")) else 3]
    gin_utils.parse([recipe], bindings, search_paths, root=_ROOT)
    return ""


def _weights(folder):
    (path,) = folder.iterdir()
    with array_files.open_arrays(str(path)) as arrays:
        for array in arrays.values():
            found = array.read()
            assert (found.shape, found.dtype) == (array.shape, array.dtype)
    return ""


@functools.cache
def _abstract_params():
    """The parameters that weights of other trainers are made into, on one device."""
    batch = {
        "images": np.zeros((1, fuzz_weights.PIXELS, fuzz_weights.PIXELS, 3), np.uint8),
        "text": np.zeros((1, fuzz_weights.LENGTH), np.int32),
    }
    model = fuzz_weights.model()
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0), batch))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_sharding()), nn.unbox(shapes)
    )


@functools.cache
def _sharding():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), partitioning.MESH_AXES)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


_RESIZED = checkpoints.RestoreCheckpointConfig().resized


def _foreign(folder):
    source = (folder / "source").read_bytes().decode("utf-8", "surrogatepass")
    wanted = _abstract_params()
    loaded = stage_handover.load_params(
        f"{folder}/{source}", wanted, _RESIZED, fuzz_weights.model()
    )
    for found, stated in zip(*map(jax.tree.leaves, (loaded.params, wanted)), strict=True):
        assert (found.shape, found.dtype) == (stated.shape, stated.dtype)
        assert np.isfinite(found).all()
    assert all(warning.isprintable() for warning in loaded.file.warnings)
    return ""


@tf.function(
    input_signature=[
        tf.TensorSpec([], tf.string),
        tf.TensorSpec([2], tf.int32),
        tf.TensorSpec([2], tf.int64),
        tf.TensorSpec([], tf.bool),
    ]
)
def _crop(encoded, size, seed, full):
    ways = [preprocessors.InceptionCrop(decode=decode) for decode in ("full", "scaled")]
    full_way, scaled_way = (lambda way=way: way(encoded, size, 16, seed) for way in ways)
    return tf.cond(full, full_way, scaled_way)


def _decode(encoded, size):
    """Both ways of training; a decoder that refuses has the sample replaced."""
    bad = ""
    for full in (False, True):
        try:
            found = _crop(encoded, np.asarray(size, np.int32), np.zeros(2, np.int64), full)
            assert found.shape == (16, 16, 3)
        except tf.errors.InvalidArgumentError:
            bad = "undecodable image"
    return bad


def _image(folder):
    return _read_image((folder / "image").read_bytes())


def _read_image(data):
    bad = ""
    try:
        image = image_files.check(data)
        bad = _decode(image.data, (image.height, image.width))
        small = shard_conversion.shrink(image, 16, 90)
        picture_grid.draw([(image.data, "as it is"), (small.data, "shrunk")])
    except BadRecord as error:
        bad = str(error)
    picture_grid.draw([(data, "as given")])
    return bad


def _shards(folder):
    captions = _CAPTIONS_OF_TARS if (folder / "train" / "00000.tar").exists() else _CAPTIONS
    fields = sources.RecordFields("jpg;image", captions)
    source = sources.ImageTextSource(str(folder), None, fields)
    index = source.index("train")
    places = np.arange(min(len(index), _MOST_RECORDS))
    examples = source.examples_at("train", places, shuffle=True, seed=1, replace_bad=False)
    for encoded, size, valid in zip(
        *(examples[name] for name in ("encoded_image", "image_size", "valid")), strict=True
    ):
        if valid:
            _decode(encoded, size)
    _convert(index.read(places))
    counts = source.records.counts()
    return ", ".join(counts)


def _convert(records):
    for number, fields in enumerate(records):
        try:
            features, _ = shard_conversion.convert(fields, number, _OPTIONS)
        except BadRecord:
            continue
        picture_grid.draw([(features["jpg"], "converted")])
    shard_formats.field_names([r for r in records if not isinstance(r, BadRecord)])


def _vocabulary(folder):
    vocabulary = vocabularies.BertVocabulary(str(folder / "vocab.txt"))
    assert vocabulary.vocab_size == len(vocabulary.pieces)
    texts = tf.constant(["a photo of a red cat", "", "\u6771\u4eac !?", "x" * 300])
    ids = vocabulary.encode_tf(texts)
    assert int(tf.reduce_max(ids.values)) < vocabulary.vocab_size
    vocabulary.decode(ids.values.numpy().tolist())
    return ""


def _word_classes(folder):
    vocabulary = vocabularies.BertVocabulary(str(folder / "vocab.txt"))
    assert vocabulary.word_classes.shape == (len(vocabulary.pieces),)
    return ""


def _class_names(folder):
    names, templates = prompts.read(str(folder / "classes.txt"), str(folder / "templates.txt"))
    assert len(prompts.prompts(names, templates)) == len(names) * len(templates)
    return ""


def _record_index(folder):
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    shard = str(folder / fuzz_inputs.shard_in(paths))
    os.utime(shard, ns=(fuzz_inputs.INDEXED_AT_NS,) * 2)
    index = record_index.load([shard], str(folder / "index"), formats.by_path(shard))
    records = index.read(np.arange(min(len(index), _MOST_RECORDS)))
    _convert(records)
    return ", ".join(str(record) for record in records if isinstance(record, BadRecord))


def _run_json(folder):
    history = run_history.load(folder)
    page = report.render(history)
    assert "<script" not in page.lower() and page.endswith("</html>\n"), page[-200:]
    return ", ".join(problem for stage in history.stages for problem in stage.problems)


def _embed(params, inputs):
    """Unit vectors [batch, 4] of whatever images or ids there are."""
    x = jnp.sin(jnp.sum(inputs.reshape(len(inputs), -1), axis=1, dtype=jnp.float32))
    x = jnp.stack([jnp.sin(x * k) for k in (1, 2, 3, 4)], axis=1)
    return x / jnp.linalg.norm(x + 1e-3, axis=1, keepdims=True)


@functools.cache
def _embed_functions():
    embed = jax.jit(_embed, out_shardings=_sharding())
    return evaluator.EmbedFunctions(embed, embed, input_pipeline.BatchLayout(_sharding()))


def _clip_benchmark(folder):
    vocabulary = tiny_records.vocabulary(folder)
    item = clip_benchmark.ClipBenchmark(
        str(folder), vocabulary, tiny_records.LENGTHS, 4, image_preprocessor=preprocessors.squash
    )
    item.check()
    values = item.evaluate({}, _embed_functions(), None)
    for name, value in values.items():
        assert name.startswith("num_") or 0 <= value <= 1, values
    return ""


READERS = {
    "gin": _gin,
    **dict.fromkeys(("npz", "safetensors", "pickle"), _weights),
    **dict.fromkeys(("tfrecord", "tar", "array_record", "csv", "parquet", "manifest"), _shards),
    "image": _image,
    "vocabulary": _vocabulary,
    "word_classes": _word_classes,
    "class_names": _class_names,
    "record_index": _record_index,
    "run_json": _run_json,
    **dict.fromkeys(fuzz_weights.FOREIGN, _foreign),
    "clip_benchmark": _clip_benchmark,
}


def read_here(kind, seed, folder):
    """Reads one input in this process; it stays in the folder."""
    folder = pathlib.Path(folder)
    fuzz_inputs.write(fuzz_inputs.make(kind, seed), folder)
    return READERS[kind](folder)
