import importlib.util
import json
import re

import experiments
import pytest

from clipa_t5x import errors, main, precompile, topologies

STAGE1 = f"{experiments.GIN}/digits_stage1.gin"


def _recipe(*bindings):
    return precompile.Recipe([STAGE1], [*experiments.MINIATURE, *bindings], [str(experiments.GIN)])


def test_the_command_ends_in_a_table_and_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bindings = [f"--gin_bindings={binding}" for binding in experiments.MINIATURE]
    with pytest.raises(SystemExit) as exit_:
        main.run(
            "precompile",
            [f"--gin_file={STAGE1}", f"--gin_search_paths={experiments.GIN}", *bindings,
             "--topology=cpu-8", "--compilation_cache_dir="],
        )  # fmt: skip
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "digits_stage1 on cpu-8, mesh replica=1, data=8, model=1: a step, per chip" in out
    record = json.loads((tmp_path / "precompile_digits_stage1_cpu-8.json").read_text())
    compiled, analytic = record["compiled_per_device"], record["analytic_per_device"]
    assert record["mesh"] == {"replica": 1, "data": 8, "model": 1} and record["fits"] is None
    assert record["stage"]["steps"] == 600
    # Data parallel: the gradients are added up over all chips, at least once.
    assert compiled["collectives"]["all-reduce"]["bytes"] >= analytic["param_bytes"]
    assert record["needed_bytes_per_device"] > analytic["param_bytes"] * 3


def _schedule(*bindings):
    """Two short stages; their files are found from the repository."""
    stages = [str(experiments.GIN / f"digits_stage{n}.gin") for n in (1, 2)]
    return precompile.Recipe(
        [str(experiments.GIN / "digits.gin")],
        [f"STAGES = {stages!r}", *experiments.MINIATURE, *bindings],
        [str(experiments.GIN)],
    )


def test_a_schedule_is_all_of_its_stages(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    precompile.run(_schedule("TRAIN_SAMPLES = 6400"), topology_name="cpu-8", price=2.0)
    record = json.loads((tmp_path / "precompile_digits_cpu-8.json").read_text())
    assert [stage["recipe"] for stage in record["stages"]] == ["digits_stage1", "digits_stage2"]
    assert [stage["stage"]["steps"] for stage in record["stages"]] == [100, 100]
    # Each with its own pixels and tokens.
    batches = [stage["analytic_per_device"]["batch_bytes"] for stage in record["stages"]]
    assert batches[0] < batches[1]
    # The CPU has no cycles to tell.
    assert record["total"] == {"chip_hours": None, "price_per_chip_hour": 2.0, "cost": None}
    out = capsys.readouterr().out
    assert out.count("a step, per chip") == 2 and "digits on cpu-8, at 2 a chip-hour" in out


def test_a_search_takes_one_stage(tmp_path):
    with pytest.raises(errors.UserError, match="--search takes one stage.*digits_stage1.gin"):
        precompile.run(_schedule(), topology_name="cpu-8", search=True)
    with pytest.raises(errors.UserError, match="STAGES of .*digits.gin is empty"):
        precompile.run(_schedule("STAGES = []"), topology_name="cpu-8")


def test_gpus_are_told_by_shapes_alone():
    on_8, _ = precompile.measure(_recipe(), topologies.parse("gpu-h100-8"), "fast")
    on_4, steps = precompile.measure(_recipe(), topologies.parse("gpu-h100-4"), "fast")
    assert on_8.compiled is None and on_8.fits is None and on_8.effort is None and steps == 600
    assert on_4.analytic.batch_bytes == 2 * on_8.analytic.batch_bytes
    assert on_4.analytic.model_flops == 2 * on_8.analytic.model_flops
    assert on_8.analytic.flops == on_8.analytic.model_flops
    assert 2 * on_8.analytic.activation_bytes == pytest.approx(on_4.analytic.activation_bytes, 0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topology_name": None}, r"needs --topology=NAME: v4-\{4\|8"),
        ({"topology_name": "v7-8"}, "'v7-8'; it must be one of"),
        ({"topology_name": "cpu-8", "mesh": {"data": 4}}, "--mesh=data=4 has 4 devices, and cpu-8"),
        ({"topology_name": "cpu-8", "mesh": {"rows": 8}}, "mesh axes .'rows'. are unknown"),
        ({"topology_name": "gpu-h100-3"}, "BATCH_SIZE is 64, not a multiple of the 3 parts"),
    ],
)
def test_mistakes_are_refused(arguments, message, tmp_path):
    with pytest.raises(errors.UserError, match=message) as refused:
        precompile.run(_recipe(), output=str(tmp_path / "x.json"), **arguments)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_chips(monkeypatch):
    """CPU devices with so little memory that the miniature fits only in part."""

    def limit(hbm_bytes):
        monkeypatch.setitem(topologies.KINDS, "cpu", topologies.Kind("cpu", hbm_bytes, 1e12))

    return limit


@pytest.mark.slow
def test_what_does_not_fit_says_what_would(small_chips, tmp_path, capsys):
    whole, _ = precompile.measure(_recipe(), topologies.parse("cpu-2"), "fast")
    small_chips(whole.needed_bytes - 1)
    with pytest.raises(errors.UserError) as refused:
        precompile.run(
            _recipe(), topology_name="cpu-2", effort="fast", output=str(tmp_path / "x.json")
        )
    found = re.fullmatch(
        r"digits_stage1 does not fit cpu-2: at least 1 B too much on each chip, of which "
        r"(activations, gradients, gathered parameters|optimizer state) take \S+ \S+\. "
        r"What fits: (.*)\.", str(refused.value)
    )  # fmt: skip
    assert found, str(refused.value)
    # Half the rows on every chip.
    assert re.search(r"--topology=cpu-4 \(\S+ [KM]iB\)", found[2])
    assert json.loads((tmp_path / "x.json").read_text())["fits"] is False
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_a_search_ranks_what_fits(small_chips, tmp_path, capsys, monkeypatch):
    names = ("IMAGE_REMAT_POLICY", "TEXT_REMAT_POLICY")
    monkeypatch.setattr(precompile, "SEARCHED", ((names, ("full", "none")), (("NO_SUCH",), (1,))))
    monkeypatch.setattr(precompile, "SEARCHED_REPLICAS", (1,))
    small_chips(1e9)
    path = tmp_path / "x.json"
    precompile.run(_recipe(), topology_name="cpu-2", search=True, output=str(path))
    rows = json.loads(path.read_text())["fits"]
    assert len(rows) == 2
    assert "IMAGE_REMAT_POLICY=\"'none'\"" in rows[0]["flags"]
    assert rows[0]["flops_per_device"] < rows[1]["flops_per_device"]
    assert capsys.readouterr().out.count("--gin.MESH=") == 2


def test_what_needs_more_than_what_does_not_fit_is_not_tried():
    def candidate(levels, **mesh):
        return precompile.Candidate(mesh, levels, {})

    refused = candidate((1, 1), data=8)
    assert candidate((2, 1), data=8).needs_more_than(refused)
    assert not candidate((2, 0), data=8).needs_more_than(refused)
    assert not candidate((2, 2), data=4).needs_more_than(refused)


def test_candidates_are_every_mesh_with_every_setting():
    found = precompile.candidates(_recipe(), topologies.parse("cpu-4"))
    meshes = {tuple(c.mesh.items()) for c in found}
    assert {dict(mesh)["replica"] for mesh in meshes} == {1, 2, 4}
    assert len(found) % (3 * len(precompile.SEARCHED[0][1])) == 0
    assert found[0].levels == (0,) * len(found[0].levels)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the extra 'tpu'"
)
def test_a_tpu_slice_needs_no_tpu():
    cost, _ = precompile.measure(_recipe(), topologies.parse("v5e-4"), "default")
    assert cost.fits and cost.compiled is not None
    assert cost.compiled.collectives["all-reduce"].bytes >= cost.analytic.param_bytes
    assert cost.seconds and 0 < cost.seconds < 0.1 and cost.mfu and 0 < cost.mfu < 1
