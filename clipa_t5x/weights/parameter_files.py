"""A model's parameters from a file or folder of any layout, under the names that they have here.

What `checkpoints` does for its own folders, up to the placing of arrays on devices.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from clipa_t5x.errors import UserError
from clipa_t5x.towers import position_embeddings
from clipa_t5x.weights import (
    architecture,
    array_sources,
    differences,
    layouts,
    open_clip_options,
)
from clipa_t5x.weights.stored_arrays import StoredArray, StoredArrays

PREFIX = "params/"
# Where parameters are in a file: alone, beside an optimizer's state, in older files within it; the
# last is PyTorch's, of a model that several devices trained.
_PREFIXES = (PREFIX, "opt/target/", "target/", "module.")
# Of OpenCLIP's state dicts: the prefix of its other class, and arrays that are no parameters.
_TEXT_PREFIX = "text."
_NO_PARAMETERS = {"attn_mask", "input_resolution", "context_length", "vocab_size"}
# How far a stored table may be from the formula for it to be the fixed one.
_TABLE_TOLERANCE = 1e-6
_OTHER_KIND = {"visual.trunk.": "a timm model", "visual.layer1.": "a ResNet"}


@dataclasses.dataclass(frozen=True)
class ParameterFile:
    """An open file of parameters.

    Attributes:
      path: where it is, for people.
      saved: arrays by parameter name, such as 'image_tower/head/kernel'; nothing of them is read.
      layout: whose names they have there, such as "CLIPA's".
      num_arrays: how many arrays there these are made of.
      ignored: names of what else is there, such as an optimizer's state.
      warnings: lines on what might not fit.
      sources: by parameter name, the arrays there that it is made of, by their names there.
    """

    path: str
    saved: StoredArrays
    layout: str = architecture.OURS
    num_arrays: int = 0
    ignored: Sequence[str] = ()
    warnings: Sequence[str] = ()
    sources: Mapping[str, StoredArrays] = dataclasses.field(default_factory=dict)

    @property
    def source_arrays(self) -> StoredArrays:
        """The arrays there that parameters are made of, each once, by their names there."""
        return {name: array for part in self.sources.values() for name, array in part.items()}

    def restore(self, request: Any) -> Any:
        """Reads parameters, one after the other, each laid out as it is asked for.

        Args:
          request: tree of `jax.ShapeDtypeStruct` with shardings, of the file's names and shapes.

        Returns:
          The same tree of `jax.Array`; bfloat16, float16 and float64 become the dtype asked for.

        Raises:
          UserError: an array is damaged, is of integers, or holds NaN or Inf.
        """

        def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            stored = self.saved[name]
            values = finite(self.path, name, stored.dtype, stored.read, leaf.dtype)
            return jax.make_array_from_callback(
                leaf.shape, leaf.sharding, lambda index: values[index]
            )

        return jax.tree_util.tree_map_with_path(place, request)


def finite(
    path: str, name: str, stored: np.dtype, read: Callable[[], np.ndarray], dtype: Any
) -> np.ndarray:
    """Reads a parameter that a model can have, as `dtype`.

    Args:
      path: where it is, for people.
      name: of the parameter.
      stored: its dtype there.
      read: reads it.
      dtype: that is asked for.

    Raises:
      UserError: it is of integers, or holds NaN, Inf or what is beyond `dtype`.
    """
    if not jax.numpy.issubdtype(stored, jax.numpy.floating):
        raise UserError(
            f"{name} of {path} is of {np.dtype(stored).name}, and parameters are floating-"
            "point numbers: give the file that training or a conversion wrote."
        )
    with np.errstate(over="ignore"):  # What is beyond the dtype is told of below.
        values = read().astype(dtype, copy=False)
    bad = values.size - int(np.isfinite(values).sum())
    if bad:
        raise UserError(
            f"{name} of {path} holds {bad} numbers of {values.size} that are NaN, Inf or "
            f"beyond {np.dtype(dtype).name}: every loss would be NaN. Give weights of a run "
            "that did not diverge."
        )
    return values


@contextlib.contextmanager
def open_parameters(
    path: str, wanted: Mapping[str, Any], model: Any = None
) -> Iterator[ParameterFile]:
    """Opens parameters as this package, CLIPA or OpenCLIP names them.

    Where names begin with 'params/' (or CLIPA's older 'opt/target/'), those are the parameters, and
    whatever else there is, such as an optimizer's state, is left there. Layers come stacked where
    they are so in `wanted`. Position tables may be of another length than wanted. A table that is
    fixed here, and so is no parameter, is compared with the one that is stored, if any.

    Args:
      path: see `array_sources.open_source`.
      wanted: by parameter name, what has its shape.
      model: a `models.ClipModel`, compared with an `open_clip_config.json` beside the weights; None
        compares nothing.

    Raises:
      UserError: as `array_sources.open_source`; or, in a layout that is not this package's own:
        names or shapes differ, a stored table is not the fixed one, or the configuration is of
        another model.
    """
    warnings = _compare_with_config(path, model)
    with array_sources.open_source(path) as arrays:
        named, ignored, full_names = _parameters(arrays)
        layout = architecture.layout_of(named)
        if layout is None:
            _refuse_subtree(path, arrays)
        layout = layout or architecture.OURS
        if layout == architecture.OURS:
            saved, parts = _stacked_as_wanted(named, wanted)
        else:
            saved, parts = _translated(path, named, layout, wanted)
        sources = {
            name: {full_names[part]: named[part] for part in dict.fromkeys(parts[name])}
            for name in saved
        }
        yield ParameterFile(path, saved, layout, len(named), ignored, warnings, sources)


def _refuse_subtree(path: str, names: Iterable[str]) -> None:
    """Says which part of a file has parameters, where they are no names at its top."""
    pattern = r"(.+?)/(params/|opt/target/|target/)?(img|txt|image_tower|text_tower)/.*"
    trees = sorted({m[1] for m in (re.fullmatch(pattern, name) for name in names) if m})
    if trees:
        raise UserError(
            f"{path} has its parameters under {', '.join(map(repr, trees[:8]))}: give "
            f"{path}:{trees[0]}."
        )


def _compare_with_config(path: str, model: Any) -> list[str]:
    config = open_clip_options.config_beside(path)
    return open_clip_options.check(config, model) if config and model is not None else []


def _parameters(arrays: StoredArrays) -> tuple[dict[str, StoredArray], list[str], dict[str, str]]:
    """(parameters by their names in their layout, names of all else, full names of the former)."""
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in arrays)), "")
    full_names = {k.removeprefix(prefix): k for k in arrays if k.startswith(prefix)}
    ignored = [name for name in arrays if not name.startswith(prefix)]
    if architecture.layout_of(full_names) == architecture.OPEN_CLIP:
        full_names = {name.removeprefix(_TEXT_PREFIX): k for name, k in full_names.items()}
        ignored += sorted(_NO_PARAMETERS & full_names.keys())
        full_names = {name: k for name, k in full_names.items() if name not in _NO_PARAMETERS}
    return {name: arrays[k] for name, k in full_names.items()}, ignored, full_names


# Parameters here, and the names in their layout of what each is made of.
_Named = tuple[dict[str, StoredArray], dict[str, list[str]]]


def _stacked_as_wanted(named: StoredArrays, wanted: Mapping[str, Any]) -> _Named:
    """Own names; layers on their own are stacked where scanned ones are wanted."""
    saved, parts = dict(named), {name: [name] for name in named}
    for name, array in wanted.items():
        layers = layouts.layer_names(name, array.shape[0]) if layouts.is_stacked(name) else []
        if layers and all(layer in named for layer in layers):
            saved[name] = _stack([saved.pop(layer) for layer in layers])
            parts[name] = layers
    return saved, parts


def _translated(path: str, named: StoredArrays, layout: str, wanted: Mapping[str, Any]) -> _Named:
    """Arrays of another layout under our names."""
    for start, kind in _OTHER_KIND.items():
        if any(name.startswith(start) for name in named):
            raise UserError(
                f"the image tower of {path} is {kind} ({start}...), and VisionTransformer is "
                "another: give weights of OpenCLIP's own vision transformer, or of CLIPA's."
            )
    shapes = layouts.unstacked({name: tuple(x.shape) for name, x in wanted.items()})
    fixed = [table for table in _TABLES if table not in shapes]
    shapes = _with_tables_of(named, layout, shapes)
    try:
        tensors = _LAYOUTS[layout](shapes)
    except UserError as error:
        raise UserError(f"{path} is in {layout} layout: {error}") from error
    found = differences.of_models(
        {name: array.shape for name, array in named.items()},
        {tensor.name: tensor.shapes for tensor in tensors},
        {name: shape for name, shape in shapes.items() if name not in fixed},
    )
    if found:
        raise UserError(
            f"{path}, in {layout} layout, {found}. Give weights of this model, or the options of "
            "theirs (--gin.NAME=VALUE)."
        )
    apart = {name: array for tensor in tensors for name, array in _parts(tensor, named, shapes)}
    for table in fixed:
        if table in apart:
            _check_fixed(path, table, apart[table])
    made_of = {part: tensor.name for tensor in tensors for part in tensor.parts}
    saved, parts = {}, {}
    for name, array in wanted.items():
        is_stacked = layouts.is_stacked(name)
        layers = layouts.layer_names(name, array.shape[0]) if is_stacked else [name]
        saved[name] = _stack([apart[layer] for layer in layers]) if is_stacked else apart[name]
        parts[name] = [made_of[layer] for layer in layers]
    return saved, parts


_LAYOUTS: Mapping[str, Callable[[layouts.Shapes], list[layouts.Tensor]]] = {
    architecture.CLIPA: layouts.clipa,
    architecture.OPEN_CLIP: layouts.open_clip,
}
# Our names of position tables, those of the layouts, and where their width is known from.
_TABLES: Mapping[str, tuple[Mapping[str, str], str]] = {
    layouts.IMAGE_POSITIONS: (
        {
            architecture.CLIPA: "img/pos_embedding",
            architecture.OPEN_CLIP: "visual.positional_embedding",
        },
        "image_tower/class_token",
    ),
    layouts.TEXT_POSITIONS: (
        {
            architecture.CLIPA: "txt/pos_embedding",
            architecture.OPEN_CLIP: "positional_embedding",
        },
        "text_tower/token_embedding/embedding",
    ),
}


def _with_tables_of(named: StoredArrays, layout: str, shapes: layouts.Shapes) -> layouts.Shapes:
    """Shapes with position tables as long as they are there; fixed ones, too, where it has them."""
    shapes = dict(shapes)
    for table, (names, like) in _TABLES.items():
        found = named.get(names[layout])
        if like in shapes and found is not None and len(found.shape) >= 2:
            shapes[table] = (found.shape[-2], shapes[like][-1])
        elif table not in shapes and layout == architecture.OPEN_CLIP and like in shapes:
            shapes[table] = (1, shapes[like][-1])  # It always has one; that it is missing is told.
    return shapes


def _parts(
    tensor: layouts.Tensor, named: StoredArrays, shapes: layouts.Shapes
) -> Iterator[tuple[str, StoredArray]]:
    """A tensor's parts, each read by reading it."""
    stored = named[tensor.name]

    def read(index: int) -> np.ndarray:
        return tensor.split(stored.read())[index]

    for i, part in enumerate(tensor.parts):
        yield part, StoredArray(shapes[part], stored.dtype, functools.partial(read, i))


def _stack(layers: Sequence[StoredArray]) -> StoredArray:
    """One array [depth, ...] of those of all layers, in memory one at a time besides it."""
    shapes = {layer.shape for layer in layers}
    dtype = functools.reduce(jax.numpy.promote_types, {layer.dtype for layer in layers})
    # Where they differ, the stack is of no one's shape, which is told of like any other shape.
    shape = (len(layers), *(layers[0].shape if len(shapes) == 1 else (-1,)))

    def read() -> np.ndarray:
        stack = np.empty(shape, dtype)
        for i, layer in enumerate(layers):
            stack[i] = layer.read()
        return stack

    return StoredArray(shape, np.dtype(dtype), read)


def _check_fixed(path: str, name: str, stored: StoredArray) -> None:
    """Compares a stored table with the one that is computed here instead.

    Raises:
      UserError: they differ, so that the file's was learned, or comes of another formula.
    """
    length, width = stored.shape
    if name == layouts.IMAGE_POSITIONS:
        tower, kind, side = "VisionTransformer", "sincos2d", round(max(length - 1, 0) ** 0.5)
        table = position_embeddings.sincos_2d(side, side, width)
    else:
        tower, kind = "TextTransformer", "sincos1d"
        table = position_embeddings.sincos_1d(length, width)
    values = stored.read()
    if table.shape == values.shape:
        table = table.astype(values.dtype).astype(np.float32)
        if np.abs(values.astype(np.float32) - table).max() <= _TABLE_TOLERANCE:
            return
    raise UserError(
        f"the position table of {path} ({length} rows) is not the fixed {kind} that "
        f"{tower}.position_embedding asks for: set --gin.{tower}.position_embedding=\"'learned'\" "
        "to take it over."
    )
