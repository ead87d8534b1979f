import experiments
import numpy as np

from clipa_t5x import gin_utils, partitioning
from clipa_t5x.data import host_iterators, input_pipeline


def test_data_begin_at_a_step_and_are_those_of_all_rows(tmp_path, monkeypatch):
    experiments.digits_dir(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    experiments.parse("digits_stage1", *experiments.UNEVALUATED, "MODEL_DIR = 'unused'")
    cfg = gin_utils.build_arguments(experiments.TRAIN)["train_dataset_cfg"]
    layout = input_pipeline.BatchLayout(partitioning.PjitPartitioner().batch_sharding())
    batches = input_pipeline.TrainIterator(cfg, layout, 2 * cfg.batch_size)
    wanted = next(batches)
    batches.close()
    halves = [
        host_iterators.TrainData(cfg, host_iterators.HostRows.of(cfg, shard, 2), first_step=2)
        for shard in range(2)
    ]
    parts = [next(half) for half in halves]
    for name, value in wanted.items():
        np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), value)
        spec = halves[0].element_spec[name]
        assert (spec.shape, spec.dtype) == (parts[0][name].shape, parts[0][name].dtype)
    for half in halves:
        half._batches.close()


def test_evaluation_data_are_all_rows_once_and_again(tmp_path, monkeypatch):
    experiments.digits_dir(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    experiments.parse(
        "digits_stage1", "EVAL_EXAMPLES = 100", "EVAL_BATCH_SIZE = 64", "MODEL_DIR = 'a'"
    )
    cfg = gin_utils.build_arguments(experiments.TRAIN)["train_eval_dataset_cfg"]
    halves = [
        host_iterators.EvaluationData(cfg, host_iterators.HostRows.of(cfg, shard, 2))
        for shard in range(2)
    ]
    for _ in range(2):
        first, second = map(list, halves)
        assert len(first) == len(second) == 2
        assert sum(batch["weights"].sum() for batch in first + second) == 100
        assert first[0].keys() == halves[0].element_spec.keys() and "augment_keys" not in first[0]
        assert first[0]["images"].shape == halves[0].element_spec["images"].shape == (32, 16, 16, 3)
