"""The console command and what every door shares: flags, processes, caches, errors.

`clipa_t5x <verb> ...` and `python -m clipa_t5x.<verb> ...` are the same.
"""

import contextlib
import importlib
import logging as standard_logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags, logging

from clipa_t5x import (
    command_flags,
    errors,
    experiment,
    gin_utils,
    goodput,
    partitioning,
    peers,
    preemption,
    processes,
    recipe_changes,
)

_FLAGS = command_flags.FLAGS

# Verbs that are configured by gin, and those that only take arguments of their own.
GIN_VERBS = (
    *("train", "eval", "schedule", "precompile", "benchmark"),
    *("export", "import_weights"),
)
# Those that go on where they were.
RESTARTABLE_VERBS = ("train", "eval", "schedule")
PLAIN_VERBS = {
    "build": "clipa_t5x.data.build",
    "report": "clipa_t5x.report",
    "compare": "clipa_t5x.compare",
    "plan": "clipa_t5x.plan",
    "law": "clipa_t5x.law",
}


def main(argv: Sequence[str] | None = None) -> None:
    """`clipa_t5x <verb> ...`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbs = [*GIN_VERBS, *PLAIN_VERBS]
    if not arguments or arguments[0] not in verbs:
        print(f"usage: clipa_t5x {{{','.join(verbs)}}} ...   (clipa_t5x <verb> --help)")
        sys.exit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    verb, rest = arguments[0], arguments[1:]
    if verb in PLAIN_VERBS:
        sys.exit(importlib.import_module(PLAIN_VERBS[verb]).main(rest))
    run(verb, rest)


def run(verb: str, arguments: Sequence[str] | None = None) -> None:
    """Runs a gin-configured verb and ends the process.

    Status 0: done. 1: a bug, with its traceback. 2: a user's mistake, in one line.
    `preemption.RESTART_STATUS`, 75: nothing is wrong with the command, and given again it goes on
    where it was; see `peers` for another status that means the same.
    """
    with contextlib.ExitStack() as stack:
        if verb in RESTARTABLE_VERBS:
            stack.enter_context(preemption.signals_end_the_process(_end_on_signal))
        status = _status(verb, arguments)
    # All are as far: an ordinary exit waits until every process has left the run.
    peers.leave()
    sys.exit(status)


def _end_on_signal(name: str) -> None:
    os.write(2, f"{name}: ending at once, with nothing to save.\n".encode())
    peers.abandon(preemption.RESTART_STATUS, f"was told to end, by {name},")


def _status(verb: str, arguments: Sequence[str] | None) -> int:
    """Runs a verb; where one of several processes fails alone, it ends here."""
    try:
        status = one_line_errors(lambda: _run(verb, arguments))
    except preemption.RestartError as stopped:
        logging.info("%s.", gin_utils.message(stopped))
        return preemption.RESTART_STATUS
    except Exception as error:
        if jax.distributed.is_initialized():
            traceback.print_exc()
            flush()
            peers.end_if_lost(error, _FLAGS.peer_timeout_seconds)
            peers.abandon(1, f"failed ({type(error).__name__})")
        raise
    if status and jax.distributed.is_initialized():
        flush()
        peers.abandon(status, "was given something wrong")
    return status


def flush() -> None:
    """Shows all that was written, before the process ends without ado."""
    logging.flush()
    sys.stdout.flush()
    sys.stderr.flush()


def one_line_errors(call: Callable[[], Any]) -> int:
    """Calls; a `UserError` becomes one line and status 2, anything else keeps its traceback."""
    try:
        call()
    except errors.UserError as error:
        logging.flush()
        print(f"error: {gin_utils.message(error)}", file=sys.stderr)
        return 2
    return 0


def _run(verb: str, arguments: Sequence[str] | None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parse_flags(verb, arguments)
    logging.set_verbosity(logging.INFO)
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.setFormatter(_Formatter())
    handler.addFilter(_is_ours_or_grave)
    start_processes()
    if verb != "precompile":  # A program from the cache would tell no time to compile.
        use_compilation_cache(_FLAGS.compilation_cache_dir)
    verbs = {
        "train": _train,
        "eval": _eval,
        "schedule": _schedule,
        "precompile": _precompile,
        "benchmark": _benchmark,
        "export": _export,
        "import_weights": _import_weights,
    }
    verbs[verb]()


def _is_ours_or_grave(record: Any) -> bool:
    """Libraries tell more than a user wants to read; what they warn of passes."""
    ours = os.path.dirname(os.path.abspath(__file__))
    # Orbax tells of every checkpoint that is opened for reading only, and of every failed save, by
    # tracebacks; what has failed is said in a line by whoever asked for it.
    is_orbax = "orbax" in record.pathname
    is_grave = standard_logging.CRITICAL if is_orbax else standard_logging.WARNING
    return record.levelno >= is_grave or record.pathname.startswith(ours)


class _Formatter(logging.PythonFormatter):
    """Time and message: who logged it matters to developers only."""

    def format(self, record: Any) -> str:
        stamp = self.formatTime(record, "%H:%M:%S")
        mark = "" if record.levelname == "INFO" else f"{record.levelname}: "
        return f"{stamp} {mark}{record.getMessage()}"


def parse_flags(verb: str, arguments: Sequence[str]) -> None:
    """Fills the flags from the command line.

    Raises:
      UserError: an unknown flag or value, or no --gin_file.
    """
    program = f"clipa_t5x {verb}"
    if {"-h", "--help", "--helpfull"} & set(arguments):
        print(f"usage: {program} --gin_file=FILE [--gin.NAME=VALUE ...]\n{_FLAGS.get_help()}")
        sys.exit(0)
    _FLAGS.unparse_flags()
    try:
        rest = _FLAGS([program, *gin_utils.rewrite_gin_args(arguments)])
    except flags.Error as error:
        raise errors.UserError(f"{error} (see {program} --help)") from error
    if len(rest) > 1:
        raise errors.UserError(
            f"{rest[1]!r} is not a flag: flags begin with --, as in --gin_file=gin/B16_stage1.gin."
        )
    if not _FLAGS.gin_file:
        raise errors.UserError(
            f"{program} needs --gin_file=FILE, for example --gin_file=gin/shapes_stage1.gin."
        )


def start_processes() -> None:
    """Joins a run of several processes where the flags say so."""
    given = [_FLAGS.coordinator_address, _FLAGS.process_count, _FLAGS.process_index]
    if all(value is None for value in given) and not _FLAGS.multiprocess:
        return
    if any(value is None for value in given) and any(value is not None for value in given):
        raise errors.UserError(
            "--coordinator_address, --process_count and --process_index go together: give all "
            "three, or none."
        )
    keep_cpu_collectives_in_order()
    timeout = _FLAGS.peer_timeout_seconds
    jax.distributed.initialize(
        *given,
        initialization_timeout=_FLAGS.join_timeout_seconds,
        heartbeat_timeout_seconds=peers.service_timeout(timeout),
    )
    preemption.take_back_sigterm()
    peers.watch(timeout)


def keep_cpu_collectives_in_order() -> None:
    """Makes every process of a CPU run issue its collectives in the same order.

    XLA's CPU backend otherwise runs independent ones as they become ready, and gloo then pairs one
    process's message with another's collective. Other backends are not affected.
    """
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def use_compilation_cache(directory: str) -> None:
    """Keeps compiled programs between starts, so that a second start compiles nothing again."""
    if directory:
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _parse_gin(*first: str, parse: Callable[..., None] = experiment.parse) -> None:
    """Parses the flags' experiment; its own bindings come after those given."""
    parse(_FLAGS.gin_file, [*first, *_FLAGS.gin_bindings], _FLAGS.gin_search_paths)


def _train() -> None:
    if _FLAGS.dry_run:
        _describe()
        return
    _parse_gin(parse=experiment.parse_to_go_on)
    if not _FLAGS.accept_recipe_changes:
        # Built again to train: objects are cheap before anything is read or compiled.
        model_dir = experiment.arguments()["model_dir"]
        recipe_changes.refuse(model_dir, gin_utils.operative_config())
    goodput.count_from(processes.start_time())
    gin_utils.get_root(experiment.ROOT)()


def _describe() -> None:
    """A dry run: writes nothing and restores nothing."""
    from clipa_t5x import train

    _parse_gin(*experiment.NO_PLACES)
    mesh = partitioning.parse_mesh(_FLAGS.mesh) if _FLAGS.mesh else None
    print(train.describe(**experiment.arguments(), mesh_shape=mesh))


def _eval() -> None:
    from clipa_t5x import eval as eval_lib
    from clipa_t5x import evaluation_watch

    _parse_gin(parse=experiment.parse_without_beginning)
    if not _FLAGS.watch:
        eval_lib.evaluate(**experiment.arguments(), checkpoint=_FLAGS.checkpoint)
        return
    if _FLAGS.checkpoint:
        raise errors.UserError(
            f"--watch evaluates all of MODEL_DIR's checkpoints, and --checkpoint is "
            f"{_FLAGS.checkpoint}: give one of the two."
        )
    patience = evaluation_watch.Patience(_FLAGS.poll_seconds, _FLAGS.news_timeout_seconds)
    eval_lib.watch(**experiment.arguments(), patience=patience)


def _export() -> None:
    from clipa_t5x import export

    _parse_gin(parse=experiment.parse_without_beginning)
    if not _FLAGS.output_dir:
        raise errors.UserError("export needs --output_dir=DIR, where the exported files go.")
    export.export(
        **experiment.arguments(),
        output_dir=_FLAGS.output_dir,
        export_format=_FLAGS.format,
        checkpoint=_FLAGS.checkpoint,
        probe_rows=_FLAGS.probe_rows,
        verify=_FLAGS.verify,
        tolerance=_FLAGS.tolerance,
    )


def _import_weights() -> None:
    from clipa_t5x import import_weights

    if not _FLAGS.source:
        raise errors.UserError("import_weights needs --source=FILE or a folder of weights.")
    _parse_gin(parse=experiment.parse_without_beginning)
    summary = import_weights.import_weights(
        **experiment.arguments(),
        source=_FLAGS.source,
        verify=_FLAGS.verify,
        tolerance=_FLAGS.tolerance,
    )
    if jax.process_index() == 0:
        print(summary)


def _schedule() -> None:
    from clipa_t5x import schedule

    goodput.count_from(processes.start_time())
    schedule.run(
        _FLAGS.gin_file,
        _FLAGS.gin_bindings,
        _FLAGS.gin_search_paths,
        _FLAGS.accept_recipe_changes,
    )


def _precompile() -> None:
    from clipa_t5x import precompile
    from clipa_t5x.data import input_pipeline

    input_pipeline.keep_accelerators_for_jax()
    precompile.run(
        precompile.Recipe(_FLAGS.gin_file, _FLAGS.gin_bindings, _FLAGS.gin_search_paths),
        topology_name=_FLAGS.topology,
        effort=_FLAGS.effort,
        mesh=partitioning.parse_mesh(_FLAGS.mesh) if _FLAGS.mesh else None,
        search=_FLAGS.search,
        price=_FLAGS.price,
        output=_FLAGS.output,
    )


def _benchmark() -> None:
    from clipa_t5x.data import benchmark

    _parse_gin(*experiment.NO_PLACES)
    print(benchmark.run(experiment.arguments()["train_dataset_cfg"], _FLAGS.seconds))


if __name__ == "__main__":
    main()
