"""The house rules that a machine can check, read off the source: nothing is imported here."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "clipa_t5x"

# Imports go down this list or stay on a line of it, never up. A name stands for a module or for a
# whole package; a module that is on no line is refused, so that its place is decided.
LAYERS = [
    {"errors", "version"},
    {"losses", "schedules", "partitioning", "towers", "metrics", "augmentation"}
    | {"processes", "wall_time", "evaluation_records", "folders"}
    | {"preemption", "peers", "watchdog"}
    | {"scaling_fit"}
    | {"topologies", "mfu", "hlo_text", "hlo_traffic", "hlo_analysis", "flop_count"},
    {"models", "optimizers", "data", "weights", "train_state", "flops"} | {"bad_numbers"},
    {"trainer", "microbatching", "checkpoints", "evaluators", "model_info", "stage_info"}
    | {"train_loop", "evaluation", "evaluation_watch", "supervision"}
    | {"gin_utils", "gin_statements", "gin_macros", "run_history", "run_summary", "report_plots"}
    | {"run_tables", "report_page"}
    | {"published", "costs", "accuracy_curves", "plan_plot", "plan_tables"}
    | {"step_cost", "cost_report"}
    | {"agreement", "checkpoint_manifest", "checkpoint_retention", "checkpoint_folders"}
    | {"checkpoint_writer", "stage_handover"}
    | {"goodput", "goodput_plot", "lease", "recipe_changes"}
    | {"sweep_runs", "inverse_scaling", "law_tables", "law_plot"},
    {"main", "experiment", "train", "eval", "schedule", "report", "data.build", "data.benchmark"}
    | {"export", "precompile", "import_weights", "plan", "compare", "law", "t5x_bridge"}
    | {"command_flags"},
]
DOORS = LAYERS[-1]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60

# Debts: to be paid, never added to. A paid one must be struck off.
LONG_FUNCTIONS: set[str] = set()
UNTESTED: set[str] = set()


def _parse(package):
    """Syntax trees by name: 'train', 'data.tasks'."""
    paths = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT / package).with_suffix("").parts) for path in paths]
    return {
        name: ast.parse(path.read_text())
        for name, path in zip(names, paths, strict=True)
        if not name.endswith("__init__")
    }


MODULES = _parse(PACKAGE)
LAUNCHERS = {f"launch.{name}": tree for name, tree in _parse("launch").items()}


def _imports(nodes):
    """Dotted names of all that import statements among `nodes` name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _own_imports(nodes):
    """Names of the package's modules among them."""
    for name in _imports(nodes):
        own = name.removeprefix(f"{PACKAGE}.")
        if own != name:
            # `from clipa_t5x.errors import UserError` names something within a module.
            yield own if own in MODULES else own.rpartition(".")[0]


def _layer(module):
    for name in (module, module.partition(".")[0]):
        for height, layer in enumerate(LAYERS):
            if name in layer:
                return height
    pytest.fail(f"{module} is on no layer: give it one in LAYERS")


def test_imports_go_one_way():
    upwards = [
        f"{module} imports {other}"
        for module, tree in MODULES.items()
        for other in _own_imports(ast.walk(tree))
        if _layer(other) > _layer(module)
    ]
    assert not upwards


def test_imports_make_no_circles():
    # A door may import another within a function: commands call each other.
    below = {module: set(_own_imports(tree.body)) for module, tree in MODULES.items()}
    while free := [module for module, others in below.items() if not others & below.keys()]:
        for module in free:
            del below[module]
    assert not below, "these import each other in circles, or what does"


def test_evaluators_know_no_trainer():
    for module, tree in MODULES.items():
        if module.startswith("evaluators."):
            assert not {"train", "trainer"} & set(_own_imports(ast.walk(tree))), module


def _importers(library):
    return {
        module
        for module, tree in MODULES.items()
        if any(f"{name}.".startswith(f"{library}.") for name in _imports(ast.walk(tree)))
    }


def test_only_doors_know_gin_and_flags():
    assert _importers("gin") <= DOORS | {"gin_utils", "gin_statements", "gin_macros"}
    assert _importers("absl.flags") <= DOORS
    assert {m for m, t in MODULES.items() if "gin_utils" in _own_imports(ast.walk(t))} <= DOORS


def test_tensorflow_is_for_data_only():
    importers = _importers("tensorflow") | _importers("tensorflow_text")
    assert not [module for module in importers if not module.startswith("data.")]


def test_only_the_bridge_knows_t5x():
    assert _importers("t5x") == {"t5x_bridge"}


def test_nothing_unpickles():
    unsafe = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
    for library in (*unsafe, "yaml"):
        assert not _importers(library)
    # It has OpenCLIP load .safetensors, and loads nothing by torch itself.
    assert _importers("torch") == {"weights.open_clip_peer"}
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, module


# What runs code that it is given, or writes wherever an archive says.
EXECUTING = {
    *("eval", "exec", "os.system", "os.popen", "shutil.unpack_archive"),
    *("subprocess.getoutput", "subprocess.getstatusoutput"),
}
EXTRACTING = {"extract", "extractall"}
LOADING_ARRAYS = {"np.load", "numpy.load", "jnp.load", "npy_format.read_array"}


def _calls():
    for module, tree in (MODULES | LAUNCHERS).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield module, ast.unparse(node.func), {k.arg: k.value for k in node.keywords}


def test_nothing_executes_what_it_reads():
    for module, name, keywords in _calls():
        assert name not in EXECUTING, f"{module} calls {name}"
        assert not getattr(keywords.get("shell"), "value", False), f"{module} calls a shell"


def test_archives_are_never_extracted_to_paths():
    for module, name, _ in _calls():
        assert name.rpartition(".")[2] not in EXTRACTING, f"{module} calls {name}"


def test_arrays_are_loaded_without_pickles():
    loads = [(module, keywords) for module, name, keywords in _calls() if name in LOADING_ARRAYS]
    assert loads, "no module loads arrays: names in LOADING_ARRAYS have changed"
    for module, keywords in loads:
        assert getattr(keywords.get("allow_pickle"), "value", True) is False, module


def test_the_library_knows_no_launcher():
    assert not _importers("launch")


def test_only_doors_print():
    printers = {
        module
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "print"
    }
    assert printers <= DOORS


def test_names_say_what_is_inside():
    vague = {"utils", "util", "common", "helpers", "helper", "misc"}
    assert not [module for module in MODULES if vague & set(module.split("."))]


def test_package_files_are_empty():
    assert not [p for p in (ROOT / PACKAGE).rglob("__init__.py") if p.read_text().strip()]


def test_the_folder_gin_is_no_package():
    # It would hide the library of that name from whoever runs in the repository.
    assert (ROOT / "gin").is_dir()
    assert not list((ROOT / "gin").rglob("__init__.py"))


def test_files_are_short():
    folders = [PACKAGE, "tests", "launch", "benchmarks"]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert not {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES}


def _lines(function):
    """Lines of a function, without its docstring."""
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def test_functions_are_short():
    long = {
        f"{module}.{node.name}"
        for module, tree in (MODULES | LAUNCHERS).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and _lines(node) > MAX_FUNCTION_LINES
    }
    assert long == LONG_FUNCTIONS


def test_every_module_has_its_test():
    def has_functions(tree):
        return any(isinstance(node, ast.FunctionDef) for node in ast.walk(tree))

    def test_file(module):
        return ROOT / "tests" / f"{module.replace('.', '/')}_test.py"

    untested = {
        module
        for module, tree in (MODULES | LAUNCHERS).items()
        if has_functions(tree) and not test_file(module).exists()
    }
    assert untested == UNTESTED
