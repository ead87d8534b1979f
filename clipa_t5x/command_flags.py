"""The flags of the verbs that gin configures; `main` says which verb has which."""

import os

from absl import flags

FLAGS = flags.FlagValues()
flags.DEFINE_multi_string(
    "gin_file", [], "A gin file; repeatable, later ones win.", flag_values=FLAGS
)
flags.DEFINE_multi_string(
    "gin_bindings",
    [],
    "A binding 'NAME = VALUE' after all files; --gin.NAME=VALUE is the same.",
    flag_values=FLAGS,
)
flags.DEFINE_list(
    "gin_search_paths",
    ["gin"],
    "Folders where gin files and their includes are looked for, after the current directory.",
    flag_values=FLAGS,
)
flags.DEFINE_boolean(
    "dry_run",
    False,
    "train: build every object, print parameters, shardings and the batch, and stop.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "mesh",
    None,
    "train --dry_run, precompile: lay the model on this mesh, such as replica=4,data=64,model=1, "
    "instead of the recipe's intended one.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "checkpoint",
    None,
    "eval, export: a MODEL_DIR, a checkpoint_<step> folder, or weights as for --source; "
    "default: the newest in MODEL_DIR.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "source",
    None,
    "import_weights: CLIPA's .npz (also FILE.npz:SUB/TREE) or T5X folder, OpenCLIP's .safetensors "
    "or a folder with open_clip_config.json, or this package's own.",
    flag_values=FLAGS,
)
flags.DEFINE_boolean(
    "watch",
    False,
    "eval: every checkpoint of MODEL_DIR as it comes, once, until the run is completed.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "poll_seconds", 10.0, "eval --watch: between two looks.", lower_bound=0.0, flag_values=FLAGS
)
flags.DEFINE_float(
    "news_timeout_seconds",
    None,
    "eval --watch: end, with the status that asks to be started again, after so long without a new "
    "checkpoint; default: wait for ever.",
    lower_bound=0.0,
    flag_values=FLAGS,
)
flags.DEFINE_boolean(
    "accept_recipe_changes",
    False,
    "train, schedule: go on where a run's recipe is not the one that trained it so far.",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "format",
    "open_clip",
    ["open_clip", "clipa", "stablehlo"],
    "export: a folder that OpenCLIP and Hugging Face load, CLIPA's .npz, or both towers as "
    "StableHLO that jax alone runs.",
    flag_values=FLAGS,
)
flags.DEFINE_string("output_dir", None, "export: where to.", flag_values=FLAGS)
flags.DEFINE_integer(
    "probe_rows", 4, "export: images and texts embedded before and after, to compare; 0 for none, "
    "so that no more than one parameter is in memory at a time.", lower_bound=0, flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_boolean(
    "verify",
    False,
    "export, import_weights: end with status 2 where embeddings differ beyond --tolerance.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "tolerance",
    1e-5,
    "export, import_weights: largest difference of an embedding's numbers.",
    lower_bound=0.0,
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "topology",
    None,
    "precompile: chips to compile for, kind-number: v4-N, v5e-N, v5p-N, v6e-N, tpu7x-N, cpu-N "
    "(compiled), gpu-a100-N, gpu-h100-N, gpu-h200-N (from shapes alone). N counts chips. A recipe "
    "that does not fit ends with status 2.",
    flag_values=FLAGS,
)
flags.DEFINE_enum(
    "effort",
    "default",
    ["fast", "default"],
    "precompile: 'fast' tells in a minute whether it fits, 'default' tells step time, too.",
    flag_values=FLAGS,
)
flags.DEFINE_boolean(
    "search",
    False,
    "precompile: try meshes, remat policies and microbatches at fast effort; rank those that fit.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "price", None, "precompile: of a chip-hour, for the stage's cost.", lower_bound=0.0,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_float(
    "seconds", 3.0, "benchmark: of one measurement of a stage of the data.", lower_bound=0.0,
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "output",
    None,
    "precompile: the JSON to write; default: precompile_<recipe>_<topology>.json here.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "compilation_cache_dir",
    os.path.join(os.path.expanduser("~"), ".cache", "clipa_t5x", "compilation"),
    "Where compiled programs are kept between starts; empty for nowhere.",
    flag_values=FLAGS,
)
flags.DEFINE_string(
    "coordinator_address",
    None,
    "host:port of process 0; with --process_count and --process_index, joins a multi-process run.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("process_count", None, "Number of processes.", flag_values=FLAGS)
flags.DEFINE_integer("process_index", None, "This process's number.", flag_values=FLAGS)
flags.DEFINE_integer(
    "peer_timeout_seconds",
    100,
    "Seconds after the death of one of several processes within which the others end, with the "
    "status that asks to be started again.",
    lower_bound=10,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "join_timeout_seconds",
    300,
    "Seconds that a process of several waits for the others to begin.",
    lower_bound=10,
    flag_values=FLAGS,
)
flags.DEFINE_boolean(
    "multiprocess", False, "Join the processes that the platform announces (TPU pods, SLURM).",
    flag_values=FLAGS,
)  # fmt: skip
