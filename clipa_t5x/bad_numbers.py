"""What becomes of a step whose loss or gradient is NaN, infinite or a spike.

Two halves. Within the jitted step `guard_update` compares, and holds back the update of a bad step;
nothing waits for the device. Where the host looks at metrics anyway, at log lines and before saves,
`judge` says whether training goes on.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipa_t5x import train_state
from clipa_t5x.errors import UnsavableError, UserError, check_number


class BadNumbersError(UnsavableError):
    """Training has diverged."""


ACTIONS = ("raise", "skip", "rewind")

# Gradient norms that scatter by less than this share are taken to scatter by it: where they hardly
# move, as on one batch over and over, the slightest change would be many standard deviations.
_LEAST_DEVIATION = 0.05
_LEAST_NORM = 1e-30

# Metrics of a step that is bad where one of them is not finite.
_FINITE = ("loss", "grad_norm", "update_norm")

IN_A_ROW = "bad_numbers/in_a_row"
SKIPPED = "bad_numbers/skipped"
SKIPPED_IN_ALL = "bad_numbers/skipped_in_all"
THRESHOLD = "bad_numbers/threshold"

_REMEDY = (
    "Lower LEARNING_RATE or lengthen WARMUP_STEPS, and start again from the last checkpoint "
    "(--accept_recipe_changes)"
)


@dataclasses.dataclass(frozen=True)
class Policy:
    """What is bad, and what is done about it.

    A step is bad where the loss, or the global norm of gradient or update, is not finite, or where
    the gradient's norm is a spike: the mean of its logarithm exceeded by `spike_sigmas` standard
    deviations. Norms are positive and scatter by factors, so that their logarithms are nearer to a
    normal distribution, and a threshold follows them through the orders of magnitude that they
    fall in a run. Bad steps
    do not enter the statistics.

    Attributes:
      action: 'raise' ends the run at the first bad step; 'skip' does not apply its update, and ends
        the run after `max_in_a_row` such steps in a row; 'rewind' restores the last checkpoint and
        goes on with the data after the bad step's. None of them saves anything of after a bad step
        that it does not go on from.
      spike_sigmas: standard deviations from the mean to a spike; None looks for NaN and Inf only.
      window: steps over which the statistics run; an average over all steps as long as there are
        fewer, an exponential one from then on.
      warmup: steps that enter the statistics before a norm can be called a spike.
      max_in_a_row: of 'skip'.
      max_rewinds: of 'rewind', over the whole run.
    """

    action: str = "raise"
    spike_sigmas: float | None = None
    window: int = 100
    warmup: int = 100
    max_in_a_row: int = 10
    max_rewinds: int = 3

    def __post_init__(self) -> None:
        """Refuses what is no policy.

        Raises:
          UserError: names the setting, its value and what it may be.
        """
        if self.action not in ACTIONS:
            raise UserError(
                f"BAD_NUMBERS_ACTION is {self.action!r}; it must be one of {list(ACTIONS)}. "
                "BAD_NUMBERS=None turns the check off."
            )
        if self.spike_sigmas is not None:
            check_number("SPIKE_SIGMAS", self.spike_sigmas, minimum=1)
        for name in ("window", "warmup", "max_in_a_row", "max_rewinds"):
            value = getattr(self, name)
            check_number(f"bad_numbers.Policy.{name}", value, minimum=1, whole=True)

    @property
    def freezes_after(self) -> int:
        """Bad steps in a row after which no update is applied any more, until the host looks."""
        return self.max_in_a_row if self.action == "skip" else 1


def fresh_guard() -> train_state.Guard:
    """The guard of a run that has seen no step."""
    return train_state.Guard(
        mean=jnp.zeros((), jnp.float32),
        variance=jnp.zeros((), jnp.float32),
        count=jnp.zeros((), jnp.int32),
        in_a_row=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        frozen=jnp.zeros((), jnp.bool_),
    )


def guard_update(
    policy: Policy,
    before: train_state.TrainState,
    after: train_state.TrainState,
    metrics: Mapping[str, jax.Array],
) -> tuple[train_state.TrainState, Mapping[str, jax.Array]]:
    """Takes a bad step's update back: part of the jitted step.

    Parameters and the optimizer's state then stay as they are, bit for bit. What counts steps goes
    on, `step` and the learning rate's own count, so that the rate keeps its timetable.

    Args:
      policy: what is bad.
      before: the state before the update, with a guard.
      after: the state after the update, whatever it is worth; its guard is not read.
      metrics: scalars of the step, 'loss', 'grad_norm' and 'update_norm' among them.

    Returns:
      The state to go on from, and the metrics with float32 scalars more: 'bad_numbers/in_a_row', 0
      where the update was applied, and no more than `Policy.freezes_after`;
      'bad_numbers/skipped_in_all', of the run; and, where spikes are looked for,
      'bad_numbers/threshold', the norm above which one is, Inf during warm-up.
    """
    guard: Any = before.guard
    norm, limit = metrics["grad_norm"], threshold(policy, guard)
    finite = [jnp.isfinite(metrics[name]) for name in _FINITE]
    bad = ~functools.reduce(jnp.logical_and, finite) | (norm > limit)
    held_back = bad | guard.frozen

    def choose(new: Any, old: Any) -> Any:
        # A select, not a branch: it joins the update's own loop over the parameters, which reads
        # the old values anyway, and leaves XLA free to write the new state over the old. What
        # remains is what clipping by the global norm costs: no update before all gradients are in.
        return new if _is_schedule(new) else jnp.where(held_back, old, new)

    params, opt_state, statistics = jax.tree.map(
        choose,
        (after.params, after.opt_state, add_norm(guard, norm, policy.window)),
        (before.params, before.opt_state, guard),
        is_leaf=_is_schedule,
    )
    in_a_row = jnp.where(held_back, guard.in_a_row + ~guard.frozen, 0)
    guard = statistics.replace(
        in_a_row=in_a_row,
        skipped=guard.skipped + held_back,
        frozen=guard.frozen | (in_a_row >= policy.freezes_after),
    )
    more = {IN_A_ROW: in_a_row, SKIPPED_IN_ALL: guard.skipped}
    if policy.spike_sigmas is not None:
        more[THRESHOLD] = limit
    metrics = {**metrics, **{name: x.astype(jnp.float32) for name, x in more.items()}}
    return after.replace(params=params, opt_state=opt_state, guard=guard), metrics  # pyright: ignore[reportAttributeAccessIssue]


def _is_schedule(node: Any) -> bool:
    return isinstance(node, optax.ScaleByScheduleState)


def threshold(policy: Policy, guard: train_state.Guard) -> jax.Array:
    """The gradient norm, float32 scalar, above which a step is a spike; Inf where none is."""
    if policy.spike_sigmas is None:
        return jnp.asarray(jnp.inf, jnp.float32)
    deviation = jnp.maximum(jnp.sqrt(guard.variance), _LEAST_DEVIATION)
    limit = jnp.exp(guard.mean + policy.spike_sigmas * deviation)
    return jnp.where(guard.count >= policy.warmup, limit, jnp.inf)


def add_norm(guard: train_state.Guard, norm: jax.Array, window: int) -> train_state.Guard:
    """The guard with one more norm in its mean and variance.

    Weighted updates of both at once, which subtract no large sums from each other (Finch, 2009,
    "Incremental calculation of weighted mean and variance", last section). The n-th norm weighs
    1 / n, then 1 / window: the plain mean and variance of up to `window` norms, without the bias to
    zero that an exponential average has at its start.

    Args:
      guard: statistics of the norms before.
      norm: float32 scalar; zero counts as a tiny one.
      window: see `Policy`.
    """
    weight = 1.0 / jnp.minimum(guard.count + 1, window)
    difference = jnp.log(jnp.maximum(norm, _LEAST_NORM)) - guard.mean
    increment = weight * difference
    return guard.replace(  # pyright: ignore[reportAttributeAccessIssue]
        mean=guard.mean + increment,
        variance=(1.0 - weight) * (guard.variance + difference * increment),
        count=guard.count + 1,
    )


@dataclasses.dataclass(frozen=True)
class Continue:
    """Training goes on.

    Attributes:
      values: means over the steps whose update was applied (over all where none was), and, with a
        policy, how many were skipped: 'bad_numbers/skipped' of these, and of the run
        'bad_numbers/skipped_in_all'.
      notice: a line for the log that names the skipped steps; empty where there are none.
    """

    values: dict[str, float]
    notice: str


@dataclasses.dataclass(frozen=True)
class Stop:
    """The run ends, and saves nothing more.

    Attributes:
      message: for a `UserError`.
    """

    message: str


@dataclasses.dataclass(frozen=True)
class Rewind:
    """The last checkpoint is restored, and training goes on with the data after a step's.

    Attributes:
      bad_step: the first whose update was not applied; nothing was changed since.
      notice: a line for the log.
    """

    bad_step: int
    notice: str


Verdict = Continue | Stop | Rewind


def judge(
    policy: Policy | None,
    first_step: int,
    steps: Sequence[Mapping[str, Any]],
    rewinds: int = 0,
) -> Verdict:
    """What the metrics of some steps mean for the run: a pure function, the same on all processes.

    Args:
      policy: that the steps were made with; None where they were not guarded: then whatever is not
        finite ends the run.
      first_step: updates done after the first of these steps, so 1 for a run's first.
      steps: their metrics in order, fetched from the device; at least one.
      rewinds: how many times the run was rewound already, over all its starts.
    """
    skipped = []
    for step, values in enumerate(steps, first_step):
        if policy is None or not values[IN_A_ROW]:
            broken = _not_finite(values)
            if broken:
                return Stop(
                    f"{_fact(values, broken)} at step {step}: training has diverged. {_REMEDY}."
                )
            continue
        verdict = _judge_bad(policy, step, values, rewinds)
        if verdict is not None:
            return verdict
        skipped.append(step)
    return Continue(_means(policy, steps), _notice(first_step, steps, skipped))


def _not_finite(values: Mapping[str, Any]) -> str | None:
    """Name of a metric that is not finite, the loss before others."""
    names = ["loss", *(name for name in values if name != THRESHOLD)]
    return next((name for name in names if not np.isfinite(values[name])), None)


def _fact(values: Mapping[str, Any], name: str) -> str:
    return f"the {name} is {float(values[name]):.6g}"


def _cause(values: Mapping[str, Any], step: int) -> str:
    """Why a step was bad: 'the loss is nan at step 7'."""
    for name in _FINITE:
        if not np.isfinite(values[name]):
            return f"{_fact(values, name)} at step {step}"
    return (
        f"{_fact(values, 'grad_norm')} at step {step}, a spike: its threshold (SPIKE_SIGMAS) was "
        f"{float(values[THRESHOLD]):.6g}"
    )


def _judge_bad(
    policy: Policy, step: int, values: Mapping[str, Any], rewinds: int
) -> Stop | Rewind | None:
    """The verdict on the first step that was not applied, None where training goes on."""
    cause = _cause(values, step)
    if policy.action == "skip":
        if values[IN_A_ROW] < policy.max_in_a_row:
            return None
        first = step - policy.max_in_a_row + 1
        return Stop(
            f"{cause}, and no update since step {first} could be applied "
            f"(bad_numbers.Policy.max_in_a_row is {policy.max_in_a_row}). {_REMEDY}."
        )
    if policy.action == "rewind":
        if rewinds < policy.max_rewinds:
            return Rewind(step, f"{cause}: going back to the last checkpoint, past this data.")
        return Stop(
            f"{cause}, and the run was rewound {rewinds} times already "
            f"(bad_numbers.Policy.max_rewinds is {policy.max_rewinds}). {_REMEDY}."
        )
    return Stop(f"{cause} (BAD_NUMBERS_ACTION is 'raise'). {_REMEDY}, or with 'skip' or 'rewind'.")


def _means(policy: Policy | None, steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The values of a log line."""
    good = steps if policy is None else [values for values in steps if not values[IN_A_ROW]]
    names = [name for name in steps[0] if name not in (IN_A_ROW, SKIPPED_IN_ALL, THRESHOLD)]
    means = {name: float(np.mean([values[name] for values in good or steps])) for name in names}
    if policy is not None:
        means[SKIPPED] = float(len(steps) - len(good))
        means[SKIPPED_IN_ALL] = float(steps[-1][SKIPPED_IN_ALL])
    limit = float(steps[-1].get(THRESHOLD, math.inf))
    if math.isfinite(limit):
        means[THRESHOLD] = limit
    return means


def _notice(first_step: int, steps: Sequence[Mapping[str, Any]], skipped: Sequence[int]) -> str:
    if not skipped:
        return ""
    causes = [_cause(steps[step - first_step], step) for step in skipped[:3]]
    rest = [f"{len(skipped) - 3} more"] if len(skipped) > 3 else []
    return f"Skipped {len(skipped)} of {len(steps)} updates: {'; '.join([*causes, *rest])}."


def as_saved(
    abstract_state: train_state.TrainState, saved_names: Sequence[str]
) -> train_state.TrainState:
    """What to restore from a checkpoint that may be of a run with the check, or of one without.

    Args:
      abstract_state: of this run, with shardings.
      saved_names: of the fields or arrays in the checkpoint, such as 'step' or 'guard/mean'.

    Returns:
      `abstract_state` with a guard just where the checkpoint has one.
    """
    if not any(name.split("/")[0] == "guard" for name in saved_names):
        return abstract_state.replace(guard=None)  # pyright: ignore[reportAttributeAccessIssue]
    sharding = abstract_state.step.sharding
    guard = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(fresh_guard),
    )
    return abstract_state.replace(guard=guard)  # pyright: ignore[reportAttributeAccessIssue]


def as_wanted(
    restored: train_state.TrainState, abstract_state: train_state.TrainState
) -> train_state.TrainState:
    """`restored` with a guard just where this run has one: the checkpoint's, else a fresh one."""
    if abstract_state.guard is None:
        return restored.replace(guard=None)  # pyright: ignore[reportAttributeAccessIssue]
    if restored.guard is not None:
        return restored
    guard = jax.jit(fresh_guard, out_shardings=abstract_state.step.sharding)()
    return restored.replace(guard=guard)  # pyright: ignore[reportAttributeAccessIssue]
