import gin
import pytest
from experiments import GIN
from saved_runs import one_line_error

from clipa_t5x import gin_macros


@pytest.fixture(autouse=True)
def no_configuration():
    gin.clear_config()
    yield
    gin.clear_config()


def test_an_override_that_nothing_reads_is_named():
    gin.parse_config("RATE = 1\nOTHER = {'a': [%RATE]}\nTHIRD = %OTHER\nRATE2 = %THIRD\nX = 2")
    gin_macros.refuse_unread(["RATE = 1", "OTHER=3", "f.a = 2"])
    call = lambda: gin_macros.refuse_unread(["RATE = 1", "RATE2 = 3"])  # noqa: E731
    one_line_error(call, "macro RATE2", "Did you mean RATE?")


FILES = {
    "engine.gin": "RATE = 1\nf.rate = [%RATE]\nOTHER = 2\nf.other = %OTHER\n",
    "run.gin": "include 'engine.gin'\nf.rate = {%OTHER: 'a'}\n",
    "misspelt.gin": "include 'engine.gin'\nOTHR = 2\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path.parent)
    return str(tmp_path)


def test_a_macro_of_a_file_that_nothing_reads_is_named(folder):
    gin_macros.refuse_unread([], ["run.gin"], [folder])
    gin_macros.refuse_unread(["f.rate = %OTHR"], ["misspelt.gin"], [folder])
    call = lambda: gin_macros.refuse_unread([], ["run.gin", "misspelt.gin"], [folder])  # noqa: E731
    one_line_error(call, "misspelt.gin:2", "macro OTHR", "Did you mean OTHER?")


def test_files_that_only_gin_finds_are_left_to_it(folder):
    gin_macros.refuse_unread([], ["misspelt.gin", "package/elsewhere.gin"], [folder])


@pytest.mark.parametrize("path", sorted(GIN.glob("*.gin")), ids=lambda path: path.stem)
def test_experiments_have_none(path):
    gin_macros.refuse_unread([], [str(path)], [str(GIN / "t5x"), str(GIN)])
