import jax
import pytest

from clipa_t5x import flops, optimizers, partitioning, schedules, step_cost, trainer

FSDP = partitioning.standard_logical_axis_rules(1, 2)


@pytest.fixture(scope="module")
def make(tiny_model, tiny_batch):
    def build(remat="none", devices=8):
        tower = {"remat_policy": remat}
        model = tiny_model(image=tower, text=tower)
        spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in tiny_batch().items()}
        partitioner = partitioning.PjitPartitioner(
            devices=jax.devices()[:devices], logical_axis_rules=FSDP
        )
        optimizer = optimizers.adamw(schedules.warmup_cosine(1e-3, 10))
        return model, trainer.Trainer(
            model=model, optimizer=optimizer, partitioner=partitioner, batch_spec=spec
        )

    return build


def test_analytic_figures_are_those_of_one_chip(make):
    (alone, split) = (step_cost.analyze(*make(devices=devices)) for devices in (1, 8))
    assert alone.num_params == split.num_params
    assert alone.param_bytes == 4 * alone.num_params
    # Two float32 moments, the step, Adam's own and the schedule's, and the key.
    assert alone.optimizer_bytes == 2 * alone.param_bytes + 3 * 4 + 8
    assert alone.batch_bytes == 16 * (16 * 16 * 3 + 4 * 8) == 8 * split.batch_bytes
    assert alone.flops == 8 * split.flops and alone.model_flops == 8 * split.model_flops
    assert alone.param_bytes / 8 < split.param_bytes < alone.param_bytes / 2


def test_activations_shrink_with_rematerialisation_and_microbatches(make, tiny_model, tiny_batch):
    kept, again = (step_cost.analyze(*make(r)).activation_bytes for r in ("none", "full"))
    model, subject = make()
    params, batch = subject.abstract_state.params, subject.abstract_batch
    # Of every block at least its input: rows x tokens x width in float32, on 8 devices.
    assert 0 < again < kept / 2
    halves = step_cost.activation_bytes(model, params, batch, 2)
    # But for the logits, which are squared.
    assert halves / 8 == pytest.approx(kept / 2, rel=0.05)


def test_model_operations_are_those_that_a_plan_counts(make):
    """Which leaves out the loss, and counts a gradient of pixels that nobody takes."""
    model, subject = make()
    planned = 16 * flops.forward_flops(model, 16, 8).training / 8
    assert step_cost.analyze(model, subject).model_flops == pytest.approx(planned, rel=0.1)


def test_rematerialisation_is_no_work_of_the_models(make):
    plain, again = step_cost.analyze(*make()), step_cost.analyze(*make("full"))
    assert plain.flops == plain.model_flops == again.model_flops
    # At most one more forward pass beside forward and backward.
    assert 1.2 < again.flops / plain.flops < 4 / 3


def test_compiled_figures_come_from_the_program(make):
    _, subject = make()
    compiled = step_cost.compile_step(subject, "fast")
    assert compiled.peak_bytes and compiled.temp_bytes and compiled.seconds > 0
    assert compiled.cycles is None
    # Parameters and moments are read and written at least once.
    analytic = step_cost.analyze(*make())
    assert compiled.bytes_accessed and compiled.bytes_accessed > 6 * analytic.param_bytes
    # Every kernel that is split is gathered at least once.
    assert compiled.collectives["all-gather"].bytes > 0
    assert jax.config.jax_exec_time_optimization_effort == 0


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("HLO temporaries (20.35G) exceeds available HBM (15.75G).", round(20.35 * 2**30)),
        ("Used 512.5M of 15.75G hbm.", round(512.5 * 2**20)),
        ("RESOURCE_EXHAUSTED", None),
    ],
)
def test_what_xla_says_when_it_refuses(message, expected):
    assert step_cost.temporaries_of_error(message) == expected
