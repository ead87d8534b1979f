"""T5X's names and signatures alone, for machines without it.

They are those of the commit that `t5x_bridge.T5X_COMMIT` names; tests/t5x_bridge_test.py compares
them with the real ones wherever T5X is installed.
"""

import abc
import dataclasses
import importlib.machinery
import types
from typing import Any

# Of every class or function that the bridge or its gin files use: names of the arguments.
SIGNATURES = {
    "checkpoints.all_steps": "checkpoints_dir",
    "gin_utils.summarize_gin_config": "model_dir summary_writer step",
    "models.BaseModel.__init__": "self optimizer_def",
    "models.BaseModel.loss_fn": "self params batch dropout_rng",
    "models.BaseModel.eval_fn": "self params batch",
    "models.BaseModel.predict_batch": "self params batch rng",
    "models.BaseModel.predict_batch_with_aux": "self params batch rng",
    "models.BaseModel.score_batch": "self params batch return_intermediates",
    "models.BaseModel.get_initial_variables": "self rng input_shapes input_types",
    "optimizers.OptaxWrapper.__init__": "self optax_optimizer",
    "partitioning.PjitPartitioner.__init__": "self num_partitions model_parallel_submesh "
    "params_on_devices backend ici_mesh_shape dcn_mesh_shape logical_axis_rules",
    "partitioning.PjitPartitioner.get_data_layout": "self batch_size host_index",
    "partitioning.PjitPartitioner.get_mesh_axes": "self train_state",
    "trainer.Trainer.__init__": "self model train_state partitioner eval_names summary_dir "
    "train_state_axes rng learning_rate_fn num_microbatches weight_metrics_computer",
    "trainer.Trainer.train": "self batch_iter num_steps start_step",
    "trainer.Trainer.eval": "self batch_iters",
    "trainer.Trainer.compile_train": "self batch",
    "trainer.Trainer.close": "self",
    "trainer.Trainer._get_step_rng": "self step",
    "trainer.MetricsManager.__init__": "self name summary_dir",
    "trainer.MetricsManager.write_scalar": "self key val step",
    "trainer.MetricsManager.close": "self",
    "utils.TrainStateInitializer.__init__": "self optimizer_def init_fn input_shapes partitioner "
    "input_types",
    "utils.TrainStateInitializer.from_scratch": "self init_rng",
    "utils.CheckpointConfig.__init__": "self save restore",
    "utils.SaveCheckpointConfig.__init__": "self dtype period checkpoint_steps keep "
    "keep_dataset_checkpoints save_dataset checkpointer_cls state_transformation_fns "
    "checkpoint_manager_cls",
    "utils.GetDatasetCallable.__call__": "self cfg shard_id num_shards feature_converter_cls "
    "num_epochs continue_from_last_checkpoint",
    "utils.GetEvalDatasetCallable.__call__": "self cfg shard_id num_shards eval_steps "
    "feature_converter_cls",
    "train.train": "model train_dataset_cfg train_eval_dataset_cfg infer_eval_dataset_cfg "
    "checkpoint_cfg partitioner trainer_cls model_dir total_steps eval_steps eval_period "
    "relative_steps stats_period random_seed use_hardware_rng summarize_config_fn "
    "inference_evaluator_cls get_dataset_fn concurrent_metrics actions train_eval_get_dataset_fn "
    "run_eval_before_training train_state_initializer_cls use_orbax verify_matching_vocabs_fn "
    "gc_period",
}
ABSTRACT = ("loss_fn", "predict_batch_with_aux", "score_batch", "get_initial_variables")


def _function(name: str, arguments: str, module: str) -> Any:
    """A function of such arguments, each with a default, that gives them back by name."""
    *own, last = arguments.split()
    names = [*own, last]
    first = names[:1] if names[0] == "self" else []
    rest = ", ".join(f"{each}=None" for each in names[len(first) :])
    source = f"def {name}({', '.join([*first, rest])}):\n    return locals()\n"
    if name == "__init__":
        source = source.replace("return locals()", "self.given = dict(locals())")
    namespace: dict[str, Any] = {"__name__": module}
    exec(source, namespace)  # Of the table above.
    return namespace[name]


def modules() -> dict[str, types.ModuleType]:
    """'t5x' and what is in it, by name, as `sys.modules` has them."""
    found = {"t5x": types.ModuleType("t5x")}
    found["t5x"].__path__ = []  # A package.
    members: dict[tuple[str, str], dict[str, Any]] = {}
    for path, arguments in SIGNATURES.items():
        module, *owner, name = path.split(".")
        full = f"t5x.{module}"
        found.setdefault(full, types.ModuleType(full))
        function = _function(name, arguments, full)
        if owner:
            members.setdefault((full, owner[0]), {})[name] = function
        else:
            setattr(found[full], name, function)
    for (module, name), functions in members.items():
        base: Any = object
        if name == "BaseModel":
            base = abc.ABC
            functions |= {each: abc.abstractmethod(functions[each]) for each in ABSTRACT}
        setattr(found[module], name, type(base)(name, (base,), {**functions, "__module__": module}))
    found["t5x.trainer"].PreemptionError = type("PreemptionError", (Exception,), {})
    for name, module in found.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(found[parent], child, module)
    return found


@dataclasses.dataclass
class TrainState:
    """What the bridge looks at of T5X's."""

    params: Any
    params_axes: Any
