"""What the bridge promises, by T5X's signatures alone; tests/t5x_conformance_test.py runs it."""

import contextlib
import importlib
import importlib.util
import inspect
import json
import pathlib
import shlex
import subprocess
import sys
import types

import experiments
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import t5x_stubs
from saved_runs import one_line_error

from clipa_t5x import gin_utils, microbatching, optimizers, partitioning
from clipa_t5x import trainer as trainer_lib
from clipa_t5x.errors import UserError

GIN = experiments.GIN
IS_INSTALLED = importlib.util.find_spec("t5x") is not None
BATCH = {
    "images": np.full((8, 16, 16, 3), 7, np.uint8),
    "text": np.arange(64, dtype=np.int32).reshape(8, 8),
    "augment_keys": np.zeros((8, 2), np.uint32),
}


@pytest.fixture(scope="module")
def bridge():
    """The module, upon stubs of T5X."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in t5x_stubs.modules().items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "clipa_t5x.t5x_bridge", raising=False)
        yield importlib.import_module("clipa_t5x.t5x_bridge")
        sys.modules.pop("clipa_t5x.t5x_bridge", None)
        import clipa_t5x

        clipa_t5x.__dict__.pop("t5x_bridge", None)


@pytest.fixture
def parse(bridge, monkeypatch):
    """Parses an experiment as T5X's train.py would, with the checks that gin leaves out."""
    monkeypatch.setattr(sys.modules["__main__"], "train", sys.modules["t5x.train"].train, False)

    def call(path, *bindings):
        unset = ["MODEL_DIR = 'unused'"]
        if "INITIAL_CHECKPOINT_PATH = %gin.REQUIRED" in _text(path):
            unset.append("INITIAL_CHECKPOINT_PATH = 'unused'")
        paths = [str(GIN / "t5x"), str(GIN)]
        gin_utils.parse([str(path)], [*unset, *bindings], paths, root="__main__.train")

    return call


def _text(path):
    """Of a file and all that it includes."""
    text = path.read_text()
    names = [line.split("'")[1] for line in text.splitlines() if line.startswith("include")]
    return text + "".join(_text(GIN / name) for name in names)


@pytest.mark.parametrize("name", ["digits_stage1", "digits_stage2", "bigG14_stage1", "H14_stage3"])
def test_every_binding_resolves(parse, name):
    """Against T5X's signatures; of others tests/t5x_conformance_test.py parses all."""
    parse(GIN / f"{name}.gin")


def test_schedules_are_refused(parse, bridge):
    parse(GIN / "digits.gin")
    call = lambda: gin_utils.build_arguments("__main__.train")  # noqa: E731
    one_line_error(call, "one stage", "schedule of 3", "digits_stage1.gin", "INITIAL_CHECKPOINT")


@pytest.mark.skipif(not IS_INSTALLED, reason="T5X is not installed; README says how")
def test_signatures_are_t5x_s():
    """Those that tests here rely on."""
    code = (
        "import importlib, inspect, json, sys\n"
        "found = {}\n"
        "for path in json.loads(sys.argv[1]):\n"
        "    module, *names = path.split('.')\n"
        "    each = importlib.import_module(f't5x.{module}')\n"
        "    for name in names: each = getattr(each, name)\n"
        "    found[path] = ' '.join(inspect.signature(each).parameters)\n"
        "print(json.dumps(found))\n"
    )
    paths = json.dumps(list(t5x_stubs.SIGNATURES))
    done = subprocess.run([sys.executable, "-c", code, paths], capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1]) == t5x_stubs.SIGNATURES, done.stderr[-2000:]


OVERRIDES = {
    "models.BaseModel": (
        "ClipModel", "loss_fn eval_fn predict_batch predict_batch_with_aux score_batch "
        "get_initial_variables",
    ),
    "partitioning.PjitPartitioner": ("Partitioner", "get_data_layout get_mesh_axes"),
    "trainer.Trainer": ("Trainer", "train eval compile_train close _get_step_rng"),
    "utils.TrainStateInitializer": ("TrainStateInitializer", "from_scratch"),
}  # fmt: skip


@pytest.mark.parametrize("owner", OVERRIDES)
def test_methods_are_overridden_by_name_and_arguments(bridge, owner):
    """One that T5X does not call would be no error, and train by T5X's own rules."""
    name, methods = OVERRIDES[owner]
    for method in methods.split():
        own = inspect.signature(vars(getattr(bridge, name))[method])
        assert " ".join(own.parameters) == t5x_stubs.SIGNATURES[f"{owner}.{method}"], method


@pytest.fixture
def built(parse):
    """What train.py is called with for a recipe."""

    def call(*bindings):
        parse(GIN / "digits_stage1.gin", *bindings)
        return gin_utils.get_root("__main__.train")()

    return call


def test_the_recipe_is_what_t5x_is_given(bridge, built):
    given = built("MODEL_DIR = 'run'", "RANDOM_SEED = 3")
    numbers = {"total_steps": 300, "eval_period": 150, "stats_period": 20, "gc_period": 50}
    assert {name: given[name] for name in numbers} == numbers and given["random_seed"] == 3
    assert pathlib.Path(given["model_dir"]).is_absolute()
    save = given["checkpoint_cfg"].given["save"].given
    assert (save["period"], save["keep"]) == (100, 3)
    # T5X casts steps and counts to any dtype, and keeps data by the number of processes.
    assert (save["dtype"], save["save_dataset"]) == (None, False)
    initializer = given["train_state_initializer_cls"](init_fn=given["model"].get_initial_variables)
    assert isinstance(initializer, bridge.TrainStateInitializer)
    assert (initializer._seed, initializer._path) == (3, None)


@pytest.mark.parametrize(
    "binding",
    [
        "BAD_NUMBERS = 1", "BAD_NUMBERS_ACTION = 'rewind'", "SPIKE_SIGMAS = 6.0",
        "HANG_TIMEOUT = 60.0", "ABORT_ON_HANG = True", "KEEP_CHECKPOINT_PERIOD = 100",
        "KEEP_BEST_CHECKPOINTS = 1", "BEST_METRIC = 'digit/accuracy'", "BEST_MODE = 'min'",
        "MAX_FAILED_SAVES = 1", "MAX_UNSAVED_STEPS = 9",
    ],
)  # fmt: skip
def test_options_of_the_built_in_engine_alone_are_refused(built, binding):
    one_line_error(lambda: built(binding), f"{binding.split()[0]} is", "cannot honour")


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ("train_data", "utils.GetDatasetCallable.__call__"),
        ("evaluation_data", "utils.GetEvalDatasetCallable.__call__"),
    ],
)
def test_functions_take_what_t5x_gives(bridge, own, name):
    """T5X calls them by position, without those that it has defaults for."""
    names = t5x_stubs.SIGNATURES[name].split()[1:]
    given = [n for n in names if n not in ("num_epochs", "continue_from_last_checkpoint")]
    keywords = {} if own == "evaluation_data" else {"model_dir": ""}
    bound = inspect.signature(getattr(bridge, own)).bind(*given, **keywords)
    assert list(bound.args) == given


@pytest.fixture
def make(bridge, tiny_model):
    def call(**kwargs):
        optimizer = optimizers.Optimizer(optax.sgd(1.0), lambda step: 1.0)
        return bridge.ClipModel(tiny_model(), optimizer, **kwargs)

    return call


def test_parameters_and_axes_have_the_same_names(make):
    model = make()
    shapes = {name: value.shape for name, value in BATCH.items()}
    variables = jax.eval_shape(
        lambda rng: model.get_initial_variables(rng, shapes), jax.random.PRNGKey(0)
    )
    params = flax.traverse_util.flatten_dict(variables["params"], sep="/")
    axes = flax.traverse_util.flatten_dict(variables["params_axes"], sep="/")
    assert {f"{name}_axes" for name in params} == axes.keys()
    for name, leaf in params.items():
        assert len(axes[f"{name}_axes"].names) == leaf.ndim, name
    names = {n for each in axes.values() for n in each.names} - {None}
    assert names <= {n for n, _ in partitioning.standard_logical_axis_rules()}
    assert {"embed", "mlp", "heads"} <= names


def variables_of(model):
    shapes = {name: value.shape for name, value in BATCH.items()}
    return model.get_initial_variables(jax.random.PRNGKey(0), shapes)


def test_loss_and_gradient_are_the_trainers(make):
    for parts in (1, 2):
        model = make(num_microbatches=parts)
        params, rng = variables_of(model)["params"], jax.random.key(1)
        batch = jax.tree.map(jnp.asarray, BATCH)
        loss = jax.value_and_grad(model.loss_fn, has_aux=True)
        (value, metrics), grads = jax.jit(loss)(flax.core.freeze(params), batch, rng)
        (wanted, _), wanted_grads = microbatching.value_and_grad(
            model.clip, params, batch, rng, parts
        )
        np.testing.assert_allclose(value, wanted, rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"].compute(), wanted, rtol=1e-6)
        for some, other in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
            np.testing.assert_allclose(some, other, rtol=1e-4, atol=1e-6)


def test_predictions(make):
    model = make()
    params = variables_of(model)["params"]
    both = model.predict_batch(params, BATCH)
    images = model.predict_batch(params, {"images": BATCH["images"]})
    text, _ = model.predict_batch_with_aux(params, {"text": BATCH["text"]})
    np.testing.assert_array_equal(both["images"], images)
    np.testing.assert_array_equal(both["text"], text)
    scores = model.score_batch(params, BATCH)
    np.testing.assert_allclose(scores, (images * text).sum(-1), rtol=1e-5)


def test_means_of_batches_are_by_examples(bridge):
    some = bridge._averages({"loss": jnp.float32(2)}, jnp.float32(3))["loss"]
    other = bridge._averages({"loss": jnp.float32(4)}, jnp.float32(1))["loss"]
    assert some.merge(other).compute() == 2.5


def test_the_partitioner_has_the_recipes_mesh_and_refuses_unknown_axes(bridge):
    spec = partitioning.PjitPartitioner(num_partitions=2)
    partitioner = bridge.Partitioner(spec)
    assert dict(partitioner.mesh.shape) == {"replica": 1, "data": 4, "model": 2}
    one_line_error(lambda: partitioner.get_data_layout(6), "BATCH_SIZE is 6")
    names = flax.linen.partitioning.AxisMetadata(("nowhere",))
    freeze = flax.core.freeze
    state = t5x_stubs.TrainState(freeze({"a": jnp.zeros(4)}), freeze({"a_axes": names}))
    one_line_error(lambda: partitioner.get_mesh_axes(state), "'nowhere'", "logical_axis_rules")


def test_periods_that_do_not_divide_each_other(bridge):
    periods = [(150, 100), (100, 50), (7, 3), (None, 100), (100, None)]
    assert [bridge.common_period(*each) for each in periods] == [50, 0, 1, 0, 0]


def test_options_that_it_has_not_are_refused(bridge):
    bridge.refuse_what_t5x_has_not(A=None, B=False, C=0)
    one_line_error(lambda: bridge.refuse_what_t5x_has_not(A=None, SPIKE_SIGMAS=3), "SPIKE_SIGMAS")


def test_its_own_microbatches_are_refused(bridge, make):
    def call():
        bridge.Trainer(
            model=make(), train_state=None, partitioner=None, evaluators={}, random_seed=0,
            dataset_cfg=None, total_steps=1, num_microbatches=2,
        )  # fmt: skip

    one_line_error(call, "num_microbatches is 2", "NUM_MICROBATCHES")


def test_microbatches_that_do_not_divide_are_refused_by_name(bridge, make):
    spec = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in BATCH.items()}

    class Data:
        batch_spec = staticmethod(lambda: spec)

    def call():
        bridge.Trainer(
            model=make(num_microbatches=3), train_state=None,
            partitioner=bridge.Partitioner(partitioning.PjitPartitioner(num_partitions=2)),
            evaluators={}, random_seed=0, dataset_cfg=Data, total_steps=1,
        )  # fmt: skip

    one_line_error(call, "NUM_MICROBATCHES is 3", "2 rows")


@pytest.fixture
def trainer(bridge, make, monkeypatch, tmp_path):
    """(one upon stubs, at step 0 of seed 5; the built-in engine's state there)."""
    monkeypatch.setattr(bridge.train_lib, "check_data", lambda *_: None)
    spec = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in BATCH.items()}
    model, partitioner = make(), bridge.Partitioner(partitioning.PjitPartitioner())
    state = trainer_lib.Trainer(
        model=model.clip, optimizer=model.optimizer, partitioner=partitioner.spec, batch_spec=spec
    ).init_state(5)

    def call(state=state, evaluators=None, total_steps=9):
        theirs = types.SimpleNamespace(
            step=state.step, params=flax.core.freeze(state.params), param_states=state.opt_state
        )
        made = bridge.Trainer(
            model=model, train_state=theirs, partitioner=partitioner, random_seed=5,
            evaluators=evaluators or {}, total_steps=total_steps, summary_dir=str(tmp_path),
            dataset_cfg=types.SimpleNamespace(batch_spec=lambda: spec),
        )  # fmt: skip
        made.train_state, made._partitioner = theirs, partitioner
        closing.callback(made.close)
        return made

    with contextlib.ExitStack() as closing:
        yield call, state


def test_a_seed_gives_the_built_in_engines_keys_and_parameters(bridge, make, trainer):
    made, state = trainer[0](), trainer[1]
    for step in (0, 7):
        key = state.replace(step=jnp.int32(step)).step_rng()
        assert made._get_step_rng(step) == key
    model = make()
    initializer = bridge.TrainStateInitializer(
        init_fn=model.get_initial_variables, random_seed=5, path=None, resized=[]
    )
    key = initializer.from_scratch(jax.random.PRNGKey(1))["init_rng"]  # As a stub was given it.
    shapes = {name: value.shape for name, value in BATCH.items()}
    params = model.get_initial_variables(jax.random.wrap_key_data(key), shapes)["params"]
    for some, other in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(some, other, rtol=1e-6)


def test_a_state_that_is_not_the_models_trains_nothing(trainer):
    call, state = trainer
    cast = state.replace(step=state.step.astype(jnp.float32))
    one_line_error(lambda: call(cast), "float32", "int32")


def test_every_step_leaves_its_state_to_be_saved(trainer):
    made = trainer[0]()
    made._compiled_train_step = lambda state, batch: (state + batch, "metrics")
    made.compile_train(None)
    assert made._compiled_train_step(1, 2) == (3, "metrics") and made.train_state == 3


def test_evaluators_run_after_the_training_evaluation(trainer, tmp_path):
    written = []

    class Evaluator:
        def evaluate(self, params, embed, output_dir):
            written.append(output_dir)
            return {"accuracy": 0.5}

    for total_steps, folder in ((9, None), (0, str(tmp_path))):  # The last step's pictures stay.
        made = trainer[0](evaluators={"digit": Evaluator()}, total_steps=total_steps)
        assert made.eval({})["digit"] == {"accuracy": 0.5}
        assert written.pop() == folder


def test_a_model_dir_is_absolute(bridge, tmp_path, monkeypatch):
    """Orbax refuses to write elsewhere, minutes after the start."""
    monkeypatch.chdir(tmp_path)
    assert bridge.absolute_model_dir("runs/mine") == str(tmp_path / "runs" / "mine")
    one_line_error(lambda: bridge.absolute_model_dir(""), "MODEL_DIR is empty")
    (tmp_path / "file").touch()
    one_line_error(lambda: bridge.absolute_model_dir("file"), "MODEL_DIR file is a file")
    monkeypatch.setattr(bridge.folders, "check_model_dir", lambda *_: None)  # Asks the bucket.
    assert bridge.absolute_model_dir("gs://bucket/mine") == "gs://bucket/mine"


def test_evaluators_run_without_a_training_evaluation(bridge, parse):
    """T5X evaluates where there are data for it; the paper's recipes have none."""
    parse(GIN / "bigG14_stage1.gin")
    (cfgs,) = (gin_utils.build_arguments("__main__.train")["train_eval_dataset_cfg"],)
    data = bridge.evaluation_data(cfgs, 0, 1, 0)
    assert cfgs and data and not list(data)


def test_all_processes_stop_at_a_step_that_is_not_saved_yet(bridge, monkeypatch):
    trainer = bridge.Trainer.__new__(bridge.Trainer)
    asked = iter([False, False, True, True])
    trainer._stop = types.SimpleNamespace(requested=lambda: next(asked))
    trainer._model_dir = "unused"
    monkeypatch.setattr(bridge, "newest_step", lambda model_dir: 7)
    batches, given = trainer._until_asked_to_stop(iter("abcdef"), first=5), []
    with pytest.raises(sys.modules["t5x.trainer"].PreemptionError) as caught:
        for batch in batches:
            given.append(batch)
    assert given == ["a", "b", "c"]  # After step 7 T5X has saved: one more.
    assert isinstance(caught.value, SystemExit) and caught.value.code == 75


def test_a_users_mistake_is_one_line(bridge, capsys):
    for error in (UserError("wrong\n  In call to configurable 'train'"), ValueError("a bug")):
        bridge.print_error(type(error), error, None)
    assert capsys.readouterr().err == "error: wrong\nValueError: a bug\n"


def test_a_state_of_another_model_or_dtype_is_refused(bridge):
    class State:
        step, params, param_states = jnp.zeros((), jnp.bfloat16), {"a": jnp.zeros(3)}, ()

    class Abstract:
        step, params, opt_state = jnp.zeros((), jnp.int32), {"a": jnp.zeros(3)}, ()

    one_line_error(lambda: bridge._check_state(State, Abstract), "bfloat16", "dtype = None")
    Abstract.params = {"a": jnp.zeros(4)}
    one_line_error(lambda: bridge._check_state(State, Abstract), "(3,)", "(4,)")


def test_without_t5x_the_install_command_is_told(monkeypatch):
    for name in ("t5x", "t5x.checkpoints"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "clipa_t5x.t5x_bridge", raising=False)
    call = lambda: importlib.import_module("clipa_t5x.t5x_bridge")  # noqa: E731
    message = one_line_error(call, "cannot be imported", "gin/t5x", "not T5X's config.gin")
    # T5X's own requirements are others than those that are tested here.
    command = message.partition("pip install --no-deps ")[2].partition(" && ")[0]
    assert [part.partition("@")[0].rpartition("/")[2] for part in shlex.split(command)] == [
        "t5x", "airio", "jestimator",
    ]  # fmt: skip
    assert all(len(part.partition("@")[2]) == 40 for part in shlex.split(command))
