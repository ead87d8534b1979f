"""A process that makes malformed inputs, has the project read them and says what happened.

It is told (kind, seed) in lines of JSON on its standard input, and answers in lines on its standard
output: {"outcome": ..., "detail": ...}. `fuzz` starts it, and notices if it dies or hangs.
"""

import json
import os
import pathlib
import resource
import shutil
import sys
import traceback

# So much more memory than there was before, and what asks for more has not looked first. Files of
# weights here have less than 100 kB, and reading them starts nothing that is large.
_MORE_MEMORY_BYTES = 3 * 2**30
_MORE_FOR_WEIGHTS_BYTES = 2**28
_WEIGHTS = {*("npz", "safetensors", "pickle", "foreign", "subtree", "open_clip_folder", "t5x")}
_MOST_LINE = 1500
_RUNS_CODE = {
    *("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"),
    *("subprocess.Popen", "socket.connect", "shutil.unpack_archive", "ctypes.dlopen"),
}
_WRITES = {"os.mkdir", "os.rename", "os.symlink", "os.link", "os.truncate", "shutil.move"}


class _Watch:
    """Notes what Python is asked to do beyond reading, and writing within a folder."""

    def __init__(self, root):
        self._root = os.path.realpath(root)
        self.active, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if not self.active:
            return
        if event in _RUNS_CODE:
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open" and self._is_write(arguments) or event in _WRITES:
            path = arguments[0]
            outside = not os.path.realpath(os.fsdecode(path)).startswith(f"{self._root}/")
            if outside and path not in (os.devnull, "/dev/null"):
                self.seen.append(f"{event} {path!r:.200}")

    @staticmethod
    def _is_write(arguments):
        path, _, flags = arguments
        wanted = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        return not isinstance(path, int) and path is not None and bool((flags or 0) & wanted)


def _limit_memory(kind):
    used = next(line for line in open("/proc/self/status") if line.startswith("VmData"))  # noqa: SIM115
    more = _MORE_FOR_WEIGHTS_BYTES if kind in _WEIGHTS else _MORE_MEMORY_BYTES
    resource.setrlimit(
        resource.RLIMIT_DATA, (int(used.split()[1]) * 1024 + more, resource.RLIM_INFINITY)
    )


def _is_clear(error):
    text = str(error)
    return 0 < len(text) <= _MOST_LINE and len(text.splitlines()) == 1 and text.isprintable()


class Worker:
    """Reads inputs, each in a folder of its own below `root`."""

    def __init__(self, root):
        self._root = pathlib.Path(root)
        self._cwd = self._root / "cwd"
        self._cwd.mkdir(parents=True, exist_ok=True)
        os.chdir(self._cwd)
        os.environ["TMPDIR"] = str(self._root)
        self._watch = _Watch(root)
        self._count = 0

    def read_valid(self, kinds):
        """Imports and traces all that readers need, and sees that they read what is sound."""
        from chaos import fuzz_inputs, fuzz_readers

        for kind in kinds:
            folder = self._folder(fuzz_inputs.valid(kind))
            fuzz_readers.READERS[kind](folder)
            shutil.rmtree(folder)

    def _folder(self, files):
        from chaos import fuzz_inputs

        self._count += 1
        folder = self._root / f"input-{self._count}"
        folder.mkdir()
        fuzz_inputs.write(files, folder)
        return folder

    def run(self, kind, seed):
        """{'outcome': 'read', 'refused', 'crash' or 'execution', 'detail': one or more lines}."""
        from chaos import fuzz_inputs, fuzz_readers

        from clipa_t5x.errors import UserError

        folder = self._folder(fuzz_inputs.make(kind, seed))
        before = sorted(os.listdir(self._root)), sorted(os.listdir(self._cwd))
        _limit_memory(kind)
        self._watch.seen.clear()
        self._watch.active = True
        try:
            bad = fuzz_readers.READERS[kind](folder)
            outcome, detail = ("refused", bad) if bad else ("read", "")
        except UserError as error:
            outcome = "refused" if _is_clear(error) else "crash"
            detail = str(error) if outcome == "refused" else f"no clear line: {error!r}"
        except (Exception, SystemExit, KeyboardInterrupt):
            outcome, detail = "crash", traceback.format_exc()
        except BaseException:  # What native code panics with.
            outcome, detail = "crash", traceback.format_exc()
        self._watch.active = False
        changed = (sorted(os.listdir(self._root)), sorted(os.listdir(self._cwd))) != before
        if self._watch.seen or changed:
            outcome = "execution"
            detail = "; ".join(self._watch.seen) or "files were made beside the input"
        shutil.rmtree(folder, ignore_errors=True)
        return {"outcome": outcome, "detail": detail}


def main():
    root, kinds = sys.argv[1], sys.argv[2].split(",")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever libraries print is no answer.
    worker = Worker(root)
    worker.read_valid(kinds)
    print(json.dumps({"outcome": "ready"}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.run(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
