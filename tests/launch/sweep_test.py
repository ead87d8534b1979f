"""What a sweep means, where each of its work units is kept, and which mistakes are told where."""

import re

import pytest
from saved_runs import one_line_error

from launch import job, sweep

SPEC = job.JobSpec(("gin/shapes_stage1.gin",), "runs/x", gin_bindings=("BATCH_SIZE = 8",))


def units(*sweeps):
    return sweep.work_units(SPEC, sweeps)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A=[1]", [{"A": "1"}]),
        ("A=[1,2] x B=[3,4]", [dict(A=a, B=b) for a in "12" for b in "34"]),
        ("A=[1,2]xB=[3,4]", [dict(A=a, B=b) for a in "12" for b in "34"]),
        ("A = [ 1 , 2 ] & B=[3, 4,]", [{"A": "1", "B": "3"}, {"A": "2", "B": "4"}]),
        (
            "x=[1,2] & B=[3,4] x C=[5,6]",
            [{"x": a, "B": b, "C": c} for a, b in ("13", "24") for c in "56"],
        ),
        ("{A=1, B=2} | {A=3}", [{"A": "1", "B": "2"}, {"A": "3"}]),
        ("{A=1}|{A=2} & B=[3,4]", [{"A": "1", "B": "3"}, {"A": "2", "B": "4"}]),
        ("{A=1} | {A=2} x B=[3]", [{"A": "1", "B": "3"}, {"A": "2", "B": "3"}]),
        ("s/m.F.p=[@n.g(), @s/n.G, %M]", [{"s/m.F.p": v} for v in ("@n.g()", "@s/n.G", "%M")]),
        (
            """A=['a,]', "it's", (1, {'k': [%M, @f()]}), [], '\\'x', '''b]''']""",
            [
                {"A": value}
                for value in ("'a,]'", '"it\'s"', "(1, {'k': [%M, @f()]})", "[]", "'\\'x'",
                              "'''b]'''")
            ],
        ),
        ("A=['@x', '%y', -1e-3, None, True]",
         [{"A": value} for value in ("'@x'", "'%y'", "-1e-3", "None", "True")]),
        ("{A={'a': 1}, B=[1, 2]}", [{"A": "{'a': 1}", "B": "[1, 2]"}]),
    ],
)  # fmt: skip
def test_grids_zips_lists_and_values(text, expected):
    assert sweep.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "place", "part"),
    [
        ("", 1, "name of a macro"),
        ("A", 2, "'=' is expected after A"),
        ("A=1", 3, "list of values"),
        ("A=[]", 3, "no values"),
        ("A=[1", 3, "never closed"),
        ("A=[1, [2, 3]", 3, "never closed"),
        ("A=[1, [2, 3", 7, "never closed"),
        ("A=['a]", 4, "quote is never closed"),
        ("A=[1)]", 5, "closes none"),
        ("A=[(1]]", 6, "closes none"),
        ("A=[1,,2]", 6, "'' is no value"),
        ("A=[abc]", 4, "'abc' is no value"),
        ("A=[1 2]", 4, "no value"),
        ("A=[5 %B]", 4, "no value"),
        ("A=[__import__('os').system('id')]", 4, "no value"),
        ("A=[9**9**9**9]", 4, "no value"),
        ("A=[1\nB = 2]", 4, "no value"),
        ("A=[1] B=[2]", 7, "'x', '&' or the end"),
        ("A=[1] x", 8, "name of a macro"),
        ("A=[1,2] & B=[1]", 16, "in step"),
        ("A=[1] x A=[2]", 14, "A is set twice"),
        ("{A=1, A=2}", 7, "A is set twice"),
        ("{}", 1, "no overrides"),
        ("{A=1", 1, "never closed"),
        ("{A=1} | B=[1]", 9, "'{' is expected"),
        ("MODEL_DIR=['x']", 1, "given to each work unit"),
        ("GIN_FILE=[1]", 11, "quoted paths"),
        ("GIN_FILE=[[]]", 11, "quoted paths"),
        ("A=[" + "[" * 5000 + "]" * 5000 + "]", 4, "no value"),
        ("A=[1,2,3,4,5,6,7,8,9,10] x B=[1,2,3,4,5,6,7,8,9,10] x C=[1,2,3,4,5,6,7,8,9,10,11]",
         82, "1100 work units"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_their_place(text, place, part):
    one_line_error(lambda: sweep.parse(text), f"--sweep, character {place} (", part)


def test_a_work_unit_has_its_overrides_and_a_folder_of_its_own():
    first, *_, last = units("LEARNING_RATE=[1e-3,2e-3] x TEXT_TOKENS=[8,16,32]")
    assert first.name == "LEARNING_RATE=1e-3,TEXT_TOKENS=8"
    assert first.spec.model_dir == f"runs/x/{first.name}"
    assert last.spec.gin_bindings == ("BATCH_SIZE = 8", "LEARNING_RATE = 2e-3", "TEXT_TOKENS = 32")
    assert last.spec.gin_file == SPEC.gin_file
    assert units()[0].name == "base" and units()[0].spec.model_dir == "runs/x/base"


def test_a_sweep_over_the_recipe_replaces_it():
    one, two = units("GIN_FILE=['a.gin', ('b.gin', 'c.gin')] x A=[1]")
    assert one.spec.gin_file == ("a.gin",) and two.spec.gin_file == ("b.gin", "c.gin")
    assert one.spec.gin_bindings == ("BATCH_SIZE = 8", "A = 1")
    assert one.name.startswith("GIN_FILE=a.gin")


HOSTILE = (
    "A=['8', 8, '../../etc', '.', 'a b', '$(id)`id`;', '\\n', 'é日', @f, %f, 'f', 'True', True, "
    f"'{'a' * 300}', '{'a' * 299}b', [1, 2], (1, 2), '[1, 2]', -1, '-1', 1.0, {{'k': 'v'}}]"
)


def test_names_of_folders_are_safe_distinct_and_short_whatever_the_values_are():
    names = [unit.name for unit in units(HOSTILE)]
    assert len({name.lower() for name in names}) == len(names) == 22
    assert all(re.fullmatch(r"A=[A-Za-z0-9._-]+", name) and len(name) <= 100 for name in names)
    assert {"A=8", "A=f", "A=True", "A=-1", "A=1.0"} <= set(names)


def test_a_name_depends_on_its_own_overrides_alone():
    assert (
        units("A=['a b']")[0].name == units("A=[3]", "A=[1, 'a b'] x C=[1]", "A=['a b']")[-1].name
    )


def test_sweeps_follow_each_other_and_no_work_unit_is_made_twice():
    assert [unit.name for unit in units("A=[1,2]", "B=[3]")] == ["A=1", "A=2", "B=3"]
    one_line_error(lambda: units("A=[1,2]", "A=[2]"), "A=2 twice")
    hundreds = [f"A=[{','.join(map(str, range(i, i + 300)))}]" for i in (0, 300, 600, 900)]
    one_line_error(lambda: units(*hundreds), "1200 work units")


def test_a_macro_that_the_recipe_does_not_know_is_refused_with_the_nearest(
    monkeypatch, pytestconfig
):
    monkeypatch.chdir(pytestconfig.rootpath)
    sweep.check(units("LEARNING_RATE=[1e-3, 2e-3]"))
    one_line_error(
        lambda: sweep.check(units("LEARNING_RATE=[1e-3]", "LEARNING_RAT=[1e-3]")),
        "work unit LEARNING_RAT=1e-3",
        "Did you mean LEARNING_RATE?",
    )
    one_line_error(
        lambda: sweep.check(units("GIN_FILE=['gin/digits_stage1.gin', 'gin/none.gin']")),
        "work unit GIN_FILE=gin-none.gin-",
        "gin/none.gin",
    )
