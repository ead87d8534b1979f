import hashlib

import pytest
from chaos import fuzz, fuzz_inputs

OF_OTHERS = ("foreign", "subtree", "open_clip_folder", "t5x", "run_json", "clip_benchmark")
SHORT = ("npz", "safetensors", "pickle", "image", "tar", "gin", *OF_OTHERS)


def digest(files):
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_inputs_are_functions_of_their_kind_and_number(kind):
    made = [digest(fuzz_inputs.make(kind, seed)) for seed in range(40)]
    assert made == [digest(fuzz_inputs.make(kind, seed)) for seed in range(40)]
    assert len(set(made)) > 30
    assert digest(fuzz_inputs.valid(kind)) not in made[:10]


def test_kinds_are_known_to_all():
    assert set(fuzz.KINDS) == set(fuzz_inputs.KINDS) == set(fuzz_inputs.VALID)


def complain(findings):
    return "\n".join(f"{f.outcome} {f.kind}:{f.seed} {f.detail}" for f in fuzz.bad(findings))


def test_malformed_inputs_are_read_or_refused_in_one_line():
    findings = fuzz.run(120, kinds=SHORT, num_workers=1, timeout_secs=60)
    assert len(findings) == 120
    assert not fuzz.bad(findings), complain(findings)
    outcomes = {finding.outcome for finding in findings}
    assert outcomes == {"read", "refused"}  # some are only bruised


# Readers that do what none should, in place of the project's; an input is which one reads it.
_BAD_READERS = """
import os, pathlib, pickle, subprocess, sys, time, types
from clipa_t5x.errors import UserError

def crash(folder):
    raise KeyError("a")

def two_lines(folder):
    raise UserError("one line\\nand another")

def abort(folder):
    os.abort()

def hang(folder):
    time.sleep(1000)

class Creates:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("canary"),)

def unpickle(folder):
    pickle.loads(pickle.dumps(Creates()))

def run(folder):
    subprocess.run(["true"])

def write(folder):
    (folder.parent.parent.parent / "canary").write_text("a")

def allocate(folder):
    bytearray(2**40)

BAD = [crash, two_lines, abort, hang, unpickle, run, write, allocate]

number = [-1]  # of the input that lies there; the first, which is sound, has none
readers = types.ModuleType("chaos.fuzz_readers")
readers.READERS = {"npz": lambda folder: "" if number[0] < 0 else BAD[number[0]](folder)}
inputs = types.ModuleType("chaos.fuzz_inputs")
inputs.valid = lambda kind: -1
inputs.make = lambda kind, seed: seed
inputs.write = lambda found, folder: number.__setitem__(0, found)
sys.modules.update({"chaos.fuzz_readers": readers, "chaos.fuzz_inputs": inputs})

from chaos import fuzz_worker
fuzz_worker.main()
"""


def test_what_readers_must_not_do_is_noticed(tmp_path, monkeypatch):
    script = tmp_path / "bad_worker.py"
    script.write_text(_BAD_READERS)
    monkeypatch.setattr(fuzz, "WORKER", [str(script)])
    findings = fuzz.run(8, kinds=["npz"], num_workers=1, timeout_secs=5)
    assert [finding.outcome for finding in findings] == [
        *("crash", "crash", "crash", "hang", "execution", "execution", "execution", "crash")
    ]
    assert "KeyError" in findings[0].detail
    assert "Fatal Python error: Aborted" in findings[2].detail
    assert "pickle.find_class" in findings[4].detail
    assert "subprocess.Popen" in findings[5].detail
    assert "canary" in findings[6].detail
    assert "MemoryError" in findings[7].detail
    table = fuzz.table(findings)
    assert "npz" in table and "all 8" in table


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [[k for k in fuzz.KINDS if k not in OF_OTHERS], OF_OTHERS])
def test_many_malformed_inputs(kinds):
    findings = fuzz.run(3000, first_seed=100, kinds=kinds)
    assert len(findings) >= 3000
    assert not fuzz.bad(findings), complain(findings)
    per_kind = {f.kind for f in findings if f.outcome == "refused"}
    assert per_kind == set(kinds)
