import os
import subprocess
import sys
import time

from clipa_t5x import processes


def test_a_process_and_its_end():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ticks = processes.start_ticks(child.pid)
    own = processes.start_ticks(os.getpid())
    assert ticks is not None and own is not None and ticks > own
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # Ended, and not yet collected.
    assert processes.start_ticks(child.pid) is None
    child.communicate()
    assert processes.start_ticks(child.pid) is None


def test_start_time_is_by_the_clock_of_the_wall():
    code = "import time; from clipa_t5x import processes as p; print(time.time(), p.start_time())"
    before = time.time()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    now, start = map(float, told.stdout.split())
    assert before - 0.05 <= start <= now


def test_processes_share_a_namespace():
    code = "from clipa_t5x import processes; print(processes.namespace_id())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == processes.namespace_id()
