"""A cluster of this machine: `srun`, `scancel` and `scontrol` that start and signal processes.

They keep to what SLURM documents of what `launch.slurm` relies on: srun tells the highest status of
its tasks, ends the others when one fails if it is asked to, and answers SIGTERM by SIGKILL; scancel
signals the tasks and not the script; a requeued job begins the script anew.
"""

import json
import os
import pathlib
import subprocess
import sys

_SRUN = """
import json, os, signal, subprocess, sys, time
state, words = os.environ["FAKE_SLURM"], sys.argv[1:]
options = []
while words[0].startswith("--"):
    options.append(words.pop(0))
with open(f"{state}/srun.jsonl", "a") as file:
    file.write(json.dumps({"options": options, "words": words}) + "\\n")
folder = next((o.partition("=")[2] for o in options if o.startswith("--chdir=")), ".")
count = int(os.environ["FAKE_TASKS"])
tasks = []
for i in range(count):
    variables = {
        "SLURM_PROCID": i, "SLURM_LOCALID": i, "SLURM_NTASKS": count,
        "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": 1,
    }
    environment = {**os.environ, **{k: str(v) for k, v in variables.items()}}
    tasks.append(subprocess.Popen(words, env=environment, cwd=folder, start_new_session=True))
def send(signum, *_):
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, signum)
signal.signal(signal.SIGTERM, lambda *_: send(signal.SIGKILL))
with open(f"{state}/tasks", "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
deadline = None
while any(task.poll() is None for task in tasks):
    if deadline is None and any(task.poll() for task in tasks):
        if "--kill-on-bad-exit=1" in options:
            send(signal.SIGTERM)
            deadline = time.monotonic() + float(os.environ.get("FAKE_KILL_WAIT", "30"))
    if deadline is not None and time.monotonic() > deadline:
        send(signal.SIGKILL)
    time.sleep(0.02)
os.remove(f"{state}/tasks")
statuses = [task.returncode for task in tasks]
sys.exit(max(128 - status if status < 0 else status for status in statuses))
"""

_SCANCEL = """
import os, signal, sys
assert sys.argv[1:] == ["--signal=TERM", os.environ["SLURM_JOB_ID"]], sys.argv
for pid in open(os.environ["FAKE_SLURM"] + "/tasks").read().split():
    try:
        os.killpg(int(pid), signal.SIGTERM)
    except ProcessLookupError:
        pass
"""

_SCONTROL = """
import os, sys
assert sys.argv[1:] == ["requeue", os.environ["SLURM_JOB_ID"]], sys.argv
if "FAKE_NO_REQUEUE" in os.environ:
    sys.exit("Requested operation not permitted")
open(os.environ["FAKE_SLURM"] + "/requeue", "w").close()
"""


class Cluster:
    """Runs sbatch scripts in a folder of its own."""

    def __init__(self, folder, num_tasks=2, **environment):
        """Of jobs with so many tasks; `environment` goes to the scripts."""
        self.folder = pathlib.Path(folder)
        self.state, programs = self.folder / "state", self.folder / "programs"
        self.state.mkdir()
        programs.mkdir()
        for name, code in (("srun", _SRUN), ("scancel", _SCANCEL), ("scontrol", _SCONTROL)):
            self.program(programs / name, code)
        self.environment = {
            **os.environ,
            "SLURM_JOB_ID": "77",
            **environment,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "FAKE_SLURM": str(self.state),
            "FAKE_TASKS": str(num_tasks),
        }

    def program(self, path, code):
        """Makes an executable of Python code."""
        path.write_text(f"#!{sys.executable} -IS\n{code}")
        path.chmod(0o755)
        return path

    def submit(self, script, meanwhile=lambda life, process: None, timeout=60, most=20):
        """Runs a script until it ends and is not requeued.

        Args:
          script: its path.
          meanwhile: called in each life of the job with its number and the script's process.
          timeout: seconds of a life.
          most: lives.

        Returns:
          Statuses of all lives, and the log.
        """
        statuses, log = [], self.folder / "job.log"
        for life in range(most):
            (self.state / "requeue").unlink(missing_ok=True)
            environment = {
                **self.environment,
                **({"SLURM_RESTART_COUNT": str(life)} if life else {}),
            }
            with log.open("a") as file:
                process = subprocess.Popen(
                    ["bash", str(script)],
                    cwd=self.folder,
                    env=environment,
                    stdout=file,
                    stderr=file,
                )
            meanwhile(life, process)
            statuses.append(process.wait(timeout))
            if not (self.state / "requeue").exists():
                return statuses, log.read_text()
        raise AssertionError(f"requeued {most} times: {log.read_text()}")

    def sruns(self):
        """What srun was called with: options and words, of each call."""
        lines = (self.state / "srun.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def tasks(self):
        """Numbers of the tasks that run; none before they have been started."""
        path = self.state / "tasks"
        return [int(pid) for pid in path.read_text().split()] if path.exists() else []
