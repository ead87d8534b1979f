"""What one train step costs a chip: memory, operations, traffic, collectives and time, without it.

Analytic figures come from shapes, shardings and the traced step; compiled ones from XLA, which
compiles the step for the described chips.
"""

import dataclasses
import functools
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from clipa_t5x import flop_count, hlo_analysis, model_info, models, topologies
from clipa_t5x import trainer as trainer_lib

EFFORTS = {"fast": -1.0, "default": 0.0}


@dataclasses.dataclass(frozen=True)
class Analytic:
    """What follows from shapes and shardings alone; bytes are of one device.

    Attributes:
      num_params: of the whole model.
      param_bytes: parameters.
      optimizer_bytes: the rest of the train state.
      batch_bytes: the step's inputs.
      activation_bytes: what the forward pass leaves for the backward pass, taken as split evenly
        over the devices; XLA may fuse some of it away.
      model_flops: operations of forward and backward pass over the global batch, with nothing
        computed twice: what utilisation is told by.
      flops: operations as traced, those that rematerialisation repeats included.
    """

    num_params: int
    param_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    activation_bytes: int
    model_flops: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA says of one device.

    Attributes:
      seconds: of compiling.
      temp_bytes: room for activations, gradients, gathered parameters and other temporaries; None
        where unknown. Not all of it is in use at the peak.
      peak_bytes: greatest memory in use at any moment, state and batch included; None where the
        step did not fit.
      bytes_accessed: read from and written to main memory, loops unrolled; None where the step did
        not fit. At fast effort XLA keeps nothing in a TPU's own fast memory, and there are more.
      collectives: by kind, loops unrolled.
      cycles: of all computations; None where XLA tells none, or at fast effort, whose schedule is
        not what a run would have. Collectives count as hidden behind them.
    """

    seconds: float
    temp_bytes: int | None
    peak_bytes: int | None
    bytes_accessed: int | None
    collectives: Mapping[str, hlo_analysis.Collective]
    cycles: int | None


def analyze(model: models.ClipModel, trainer: trainer_lib.Trainer) -> Analytic:
    """Analytic figures of a trainer's step."""
    state, batch = trainer.abstract_state, trainer.abstract_batch
    devices = math.prod(trainer.mesh.shape.values())
    params = sum(model_info.bytes_per_device(x) for x in jax.tree.leaves(state.params))
    whole = sum(model_info.bytes_per_device(x) for x in jax.tree.leaves(state))
    kept = activation_bytes(model, state.params, batch, trainer.num_microbatches)
    return Analytic(
        num_params=model_info.num_params(state.params),
        param_bytes=params,
        optimizer_bytes=whole - params,
        batch_bytes=sum(model_info.bytes_per_device(x) for x in batch.values()),
        activation_bytes=kept // devices,
        model_flops=model_flops(model, state.params, batch) // devices,
        flops=flop_count.traced(trainer.traced_train_step) // devices,
    )


def activation_bytes(
    model: models.ClipModel, params: Any, batch: Any, num_microbatches: int = 1
) -> int:
    """Bytes that the forward pass of a global batch leaves for the backward pass.

    Args:
      model: the model, with its rematerialisation.
      params: abstract.
      batch: abstract.
      num_microbatches: of which only one at a time leaves anything.
    """

    def left(params: Any, batch: Any, rng: jax.Array) -> list[jax.Array]:
        loss = functools.partial(models.training_loss, model, batch=batch, rng=rng)
        _, pull_back, _ = jax.vjp(lambda p: loss(params=p), params, has_aux=True)
        return jax.tree.leaves(pull_back)

    def part(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((x.shape[0] // num_microbatches, *x.shape[1:]), x.dtype)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    traced = jax.make_jaxpr(left)(shapes, jax.tree.map(part, batch), jax.random.key(0)).jaxpr
    # Parameters and the batch are not activations; what is left twice lies there once.
    given = {id(x) for x in (*traced.invars, *traced.constvars)}
    arrays = {id(x): x.aval for x in traced.outvars if id(x) not in given}
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values())


def model_flops(model: models.ClipModel, params: Any, batch: Any) -> int:
    """Operations of the loss and its gradient over a global batch, nothing computed twice.

    Args:
      model: the model.
      params: abstract.
      batch: abstract.
    """
    loss = functools.partial(models.training_loss, without_remat(model))
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    # Where arrays lie changes nothing that is counted.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch))
    return flop_count.traced(gradient.trace(*shapes, jax.random.key(0)))


def without_remat(model: models.ClipModel) -> models.ClipModel:
    """The same model, keeping all activations, in towers that know of rematerialisation."""

    def keep_all(tower: Any) -> Any:
        return tower.clone(remat_policy="none") if hasattr(tower, "remat_policy") else tower

    return model.clone(
        image_tower=keep_all(model.image_tower), text_tower=keep_all(model.text_tower)
    )


def compile_step(trainer: trainer_lib.Trainer, effort: str) -> Compiled:
    """Compiles a trainer's step for the devices of its mesh.

    Args:
      trainer: with a mesh of real or described devices.
      effort: 'fast' for memory alone, 'default' for a schedule like a run's.

    Returns:
      Figures of the compiled program; where it does not fit the chips' memory, what is known of it.
    """
    previous = jax.config.jax_exec_time_optimization_effort  # pyright: ignore
    jax.config.update("jax_exec_time_optimization_effort", EFFORTS[effort])
    start = time.perf_counter()
    try:
        # Not `compiled_train_step`: an executable as big as this need not live on.
        compiled = trainer.lower_train_step().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = temporaries_of_error(str(error))
        return Compiled(time.perf_counter() - start, needed, None, None, {}, None)
    finally:
        jax.config.update("jax_exec_time_optimization_effort", previous)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    analysis = hlo_analysis.analyze(compiled.as_text())
    return Compiled(
        seconds=seconds,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        bytes_accessed=analysis.bytes_accessed,
        collectives=analysis.collectives,
        cycles=analysis.cycles or None if effort == "default" else None,
    )


def temporaries_of_error(message: str) -> int | None:
    """Bytes of temporaries that XLA says it would need, from its refusal; None where it is mute."""
    match = re.search(r"temporaries \(([\d.]+)([KMGT])\)", message)
    match = match or re.search(r"[Uu]sed ([\d.]+)([KMGT])", message)
    return round(float(match[1]) * 1024 ** (" KMGT".index(match[2]))) if match else None


@dataclasses.dataclass(frozen=True)
class StepCost:
    """One train step on one topology; properties derive what people ask for.

    Attributes:
      topology: the chips.
      mesh: axis sizes.
      effort: of the compilation; None where nothing was compiled.
      analytic: from shapes and shardings.
      compiled: from XLA; None where it was not asked.
    """

    topology: topologies.Topology
    mesh: Mapping[str, int]
    effort: str | None
    analytic: Analytic
    compiled: Compiled | None

    @property
    def state_bytes(self) -> int:
        """Train state and batch of one device."""
        a = self.analytic
        return a.param_bytes + a.optimizer_bytes + a.batch_bytes

    @property
    def needed_bytes(self) -> int:
        """Memory that one device needs: at its peak, or what is known of it."""
        if self.compiled is None:
            # Gradients lie as their parameters, and take the room of activations as they go.
            return self.state_bytes + max(self.analytic.param_bytes, self.analytic.activation_bytes)
        if self.compiled.peak_bytes is None:
            return self.state_bytes + (self.compiled.temp_bytes or 0)
        return self.compiled.peak_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the step runs on the chips; None where that is not known."""
        if self.compiled is not None and self.compiled.peak_bytes is None:
            return False
        limit = self.topology.kind.hbm_bytes
        if limit is None:
            return None
        if self.compiled is None:
            # What activations take is not known well enough to say more.
            return False if self.state_bytes + self.analytic.param_bytes > limit else None
        return self.needed_bytes <= limit

    @property
    def seconds(self) -> float | None:
        """Estimated time of the step."""
        clock = self.topology.kind.clock
        if self.compiled is None or self.compiled.cycles is None or clock is None:
            return None
        return self.compiled.cycles / clock

    @property
    def mfu(self) -> float | None:
        """Model operations per second over the chips' peak, by the estimated time."""
        peak = self.topology.kind.peak_flops
        if self.seconds is None or peak is None:
            return None
        per_device = peak / self.topology.kind.devices_per_chip
        return self.analytic.model_flops / self.seconds / per_device
