"""The same recipe on both engines: the same losses, parameters, order of data and stages.

Needs T5X (README, "Two engines"), and runs its own train.py.
"""

import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import experiments
import numpy as np
import pytest

from clipa_t5x import preemption
from clipa_t5x.weights import array_sources

SPEC = importlib.util.find_spec("t5x")
pytestmark = [
    pytest.mark.t5x,
    pytest.mark.skipif(SPEC is None, reason="T5X is not installed; README says how"),
]
GIN = experiments.GIN
STEPS = 20
SETTINGS = (
    *experiments.MINIATURE, f"TRAIN_STEPS = {STEPS}", "WARMUP_STEPS = 5", "LOG_PERIOD = 1",
    "CHECKPOINT_PERIOD = 5", "KEEP_CHECKPOINTS = None", f"EVAL_PERIOD = {STEPS}",
    "EVAL_EXAMPLES = 128",
)  # fmt: skip
PARALLEL = {"data": "NUM_MODEL_PARTITIONS = 1", "model": "NUM_MODEL_PARTITIONS = 2"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the data, and one with the package alone: T5X's gin takes folders on the
    path, such as a repository's data/, for packages of gin files."""
    folder = tmp_path_factory.mktemp("t5x")
    experiments.digits_dir(str(folder))
    (folder / "site").mkdir()
    (folder / "site" / "clipa_t5x").symlink_to(experiments.REPOSITORY / "clipa_t5x")
    return folder


def begin(
    workspace, experiment, name, *bindings, settings=SETTINGS, flags=(), devices=4, folder=None
):
    """Starts T5X's train.py with this project's gin files; what it says goes to a file.

    MODEL_DIR is relative, as in README.
    """
    command = [
        sys.executable, os.path.join(os.path.dirname(SPEC.origin), "train.py"),
        f"--gin_search_paths={GIN / 't5x'},{GIN}", f"--gin_file={GIN / experiment}.gin",
        *(f"--gin_bindings={b}" for b in (*settings, f"MODEL_DIR = '{folder or name}'")),
        *(f"--gin_bindings={b}" for b in bindings), *flags,
    ]  # fmt: skip
    environment = experiments.environment(devices, optimized=True)
    root = pathlib.Path(SPEC.origin).parents[1]
    paths = [str(workspace / "site"), *(p for p in sys.path if p and "site-packages" in p)]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, str(root)])
    with (workspace / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, cwd=workspace, env=environment, stdout=log, stderr=log)


def on_t5x(workspace, experiment, name, *bindings):
    """Trains to the end; the steps' losses."""
    process = begin(workspace, experiment, name, *bindings)
    assert process.wait(600) == 0, log(workspace, name)
    return losses(workspace, name)


def log(workspace, name):
    return (workspace / f"{name}.log").read_text(errors="replace")[-3000:]


def losses(workspace, name, group="train"):
    """Of every step that T5X has written, in TensorBoard's files."""
    import tensorflow as tf

    found = {}
    for path in sorted((workspace / name / group).glob("events*")):
        # Of a run that goes on, the last record may be half written.
        with contextlib.suppress(tf.errors.DataLossError):
            for event in tf.compat.v1.train.summary_iterator(str(path)):
                for value in event.summary.value:
                    if value.tag == "loss":
                        found[event.step] = float(tf.make_ndarray(value.tensor))
    return found


def here(workspace, experiment, name, *bindings):
    """Trains with the built-in engine; the steps' losses."""
    command = experiments.command(
        "train", f"--gin_file={GIN / experiment}.gin",
        *(f"--gin_bindings={b}" for b in (*SETTINGS, f"MODEL_DIR = '{workspace / name}'")),
        *(f"--gin_bindings={b}" for b in bindings),
    )  # fmt: skip
    done = experiments.run(command, str(workspace), num_devices=4, timeout=600, optimized=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = map(json.loads, (workspace / name / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["values"]["loss"] for line in lines if line["group"] == "train"}


def difference(some, others):
    """The largest relative difference of two runs' losses, which have the same steps."""
    assert some.keys() == others.keys() and len(some) == STEPS
    return max(abs(some[step] / others[step] - 1) for step in some)


def parameters(folder):
    """Of T5X's checkpoint, by name."""
    with array_sources.open_source(str(folder)) as arrays:
        return {name: array.read() for name, array in arrays.items()}


@pytest.fixture(scope="module", params=PARALLEL)
def both(workspace, request):
    """(name, losses on T5X, losses here) of the first stage."""
    name = f"{request.param} parallel"
    on = on_t5x(workspace, "digits_stage1", name, PARALLEL[request.param])
    return name, on, here(workspace, "digits_stage1", f"{name} here", PARALLEL[request.param])


def test_losses_and_parameters_agree_step_by_step(workspace, both):
    name, on, without = both
    assert difference(on, without) <= 1e-5
    for step in (5, 10, 15, 20):
        there = parameters(workspace / name / f"checkpoint_{step}")
        state = experiments.saved_state(str(workspace / f"{name} here"), step)
        ours = {k.removeprefix("params/"): v for k, v in state.items() if k.startswith("params/")}
        assert there.keys() == ours.keys()
        for parameter, value in there.items():
            # Adam makes steps of the learning rate's size of gradients that are but rounding.
            limit = 1e-2 if parameter.endswith("key/bias") else 2e-5
            np.testing.assert_allclose(value, ours[parameter], atol=limit, err_msg=parameter)


def test_evaluations_agree(workspace, both):
    name, _, _ = both
    (there,) = losses(workspace, name, "training_eval/digits_eval").values()
    lines = (workspace / f"{name} here" / "metrics.jsonl").read_text().splitlines()
    ours = [v for v in map(json.loads, lines) if v["group"] == "training_eval/digits_eval"]
    assert there == pytest.approx(ours[-1]["values"]["loss"], rel=1e-5)
    assert "Evaluation digit after step 20" in (workspace / f"{name}.log").read_text()


def begin_processes(workspace, name, count, *bindings):
    """As `begin`, of processes that share 4 devices; their logs are '<name> <index>.log'."""
    if count == 1:
        return [begin(workspace, "digits_stage1", f"{name} 0", *bindings, folder=name)]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [
        begin(
            workspace, "digits_stage1", f"{name} {index}", *bindings, devices=4 // count,
            folder=name, flags=(
                "--multiprocess_gpu", f"--coordinator_address=127.0.0.1:{port}",
                f"--process_count={count}", f"--process_index={index}",
            ),
        )
        for index in range(count)
    ]  # fmt: skip


def test_a_stopped_run_goes_on_with_the_same_data(workspace, both):
    """SIGTERM, to one of two processes: T5X saves, and another number of them goes on there."""
    name, on, _ = both
    again, count = f"{name} stopped", {"data": 1, "model": 2}[name.split()[0]]
    partition = PARALLEL[name.split()[0]]
    processes = begin_processes(workspace, again, count, partition)
    deadline = time.monotonic() + 300
    while len(losses(workspace, again)) < 3 and time.monotonic() < deadline:
        assert processes[0].poll() is None, log(workspace, f"{again} 0")
        time.sleep(0.05)
    processes[-1].send_signal(signal.SIGTERM)
    statuses = [process.wait(120) for process in processes]
    assert statuses == [preemption.RESTART_STATUS] * count, log(workspace, f"{again} 0")
    assert "stopped after step" in (workspace / f"{again} 0.log").read_text()
    saved = max(int(p.name.split("_")[1]) for p in (workspace / again).glob("checkpoint_*"))
    assert 3 <= saved < STEPS and saved % 5
    rest = on_t5x(workspace, "digits_stage1", again, partition)
    assert difference(rest, on) <= (0 if count == 1 else 1e-5)


def test_the_next_stage_takes_over(workspace, both):
    """Of T5X's checkpoint, on either engine: positions resized, a fresh optimizer, step 0."""
    name, _, _ = both
    bindings = (PARALLEL[name.split()[0]], f"INITIAL_CHECKPOINT_PATH = '{workspace / name}'")
    on = on_t5x(workspace, "digits_stage2", f"{name} 2", *bindings)
    assert difference(on, here(workspace, "digits_stage2", f"{name} 2 here", *bindings)) <= 1e-5
    assert (
        "text_tower/position_embedding: 8 -> 16 positions"
        in (workspace / f"{name} 2.log").read_text()
    )


def test_exact_microbatches_change_nothing(workspace, both):
    name, on, _ = both
    bindings = (
        PARALLEL[name.split()[0]], "NUM_MICROBATCHES = 2", "TRAIN_EVAL_DATASET = None"
    )  # fmt: skip
    parts = on_t5x(workspace, "digits_stage1", f"{name} in parts", *bindings)
    assert difference(parts, on) <= 1e-5
    text = (workspace / f"{name} in parts.log").read_text()
    assert "Evaluation digit after step 20" in text  # Without data for the loss, too.


def test_its_checkpoints_are_exported(workspace, both):
    name, _, _ = both
    out = workspace / f"{name} exported"
    command = experiments.command(
        "export", f"--gin_file={GIN / 'digits_stage1'}.gin", f"--output_dir={out}",
        f"--checkpoint={workspace / name}", "--format=open_clip", "--gin.MODEL_DIR='unused'",
        *(f"--gin_bindings={b}" for b in SETTINGS),
    )  # fmt: skip
    done = experiments.run(command, str(workspace), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "open_clip_config.json").exists()
    exported = parameters(out)
    there = parameters(workspace / name / f"checkpoint_{STEPS}")
    np.testing.assert_array_equal(exported["logit_scale"], there["logit_scale"])
    names = {"positional_embedding": "position_embedding", "token_embedding.weight": "embedding"}
    for theirs, ours in names.items():
        (name,) = [n for n in there if n.startswith("text_tower") and n.endswith(f"/{ours}")]
        np.testing.assert_array_equal(exported[theirs], there[name])


@pytest.mark.parametrize(
    ("experiment", "binding", "parts"),
    [
        ("digits_stage1", "SPIKE_SIGMAS = 6.0", ["SPIKE_SIGMAS is 6.0", "built-in engine"]),
        ("digits_stage1", "LEARNIG_RATE = 1", ["LEARNIG_RATE", "Did you mean LEARNING_RATE?"]),
        ("digits_stage1", "BAD_NUMBERS_ACTION = 'rewind'", ["BAD_NUMBERS_ACTION is", "'rewind'"]),
        ("digits_stage1", "NUM_MICROBATCHES = 3", ["NUM_MICROBATCHES is 3", "16 rows"]),
        ("digits_stage1", "BATCH_SIZE = 63", ["BATCH_SIZE is 63"]),
        ("digits", "STAGES = ['a.gin']", ["one stage", "a.gin"]),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(workspace, experiment, binding, parts):
    name = f"refused {parts[0]}"
    settings = SETTINGS if experiment == "digits_stage1" else ()
    process = begin(workspace, experiment, name, binding, settings=settings)
    assert process.wait(300) != 0
    text = (workspace / f"{name}.log").read_text()
    assert "Traceback" not in text
    message = next(line for line in text.splitlines() if line.startswith("error: "))
    assert all(part in message for part in parts)


_PARSE_ALL = """
import pathlib, sys
import gin
import __main__
from t5x import gin_utils, train
__main__.train = gin.configurable(train.train)
root = pathlib.Path(sys.argv[1])
files = sorted(root.glob("*.gin"))
for path in files:
    gin.clear_config()
    bindings = ["MODEL_DIR = 'unused'", "INITIAL_CHECKPOINT_PATH = 'unused'"]
    gin_utils.parse_gin_flags([str(root / "t5x"), str(root)], [str(path)], bindings)
print(len(files), "parsed")
"""


def test_every_experiment_parses(workspace):
    script = workspace / "scripts" / "parse_all.py"
    script.parent.mkdir()
    script.write_text(_PARSE_ALL)
    environment = experiments.environment(1)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(workspace / "site"), *(p for p in sys.path if p and "site-packages" in p)]
    )
    command = [sys.executable, str(script), str(GIN)]
    done = subprocess.run(
        command, cwd=workspace, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{len(list(GIN.glob('*.gin')))} parsed" in done.stdout
