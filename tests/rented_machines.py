"""Rented machines told of by their workers' answers, for the controller: its service is a fake one.

Time is turned by whoever sleeps. The workers are told of by what they would say; the commands that
make them say it have tests of their own.
"""

import dataclasses
import threading

from fake_tpu import FakeTpu, TurnedClock

from launch import cloud_tpu
from launch.controller import Controller, Patience, Start, UnreachableError
from launch.job import RestartPolicy

PLACE = cloud_tpu.Place("p", "us-east5-b", "my-run")
MACHINES = cloud_tpu.Machines("v5litepod-16", "v2-alpha-tpuv5-lite", tier="spot")
POLICY = RestartPolicy(max_restarts=6, first_delay=10, max_delay=300, healthy_seconds=900)
PATIENCE = Patience(
    poll=30, check=60, active=12 * 3600, reach=600, peers=300, stop=300, delete=7200
)  # fmt: skip


class KilledError(BaseException):
    """The controller's process is no more."""


class KillableClock(TurnedClock):
    """Kills the controller when it looks at it for the so-manieth time, and whenever afterwards.

    The service, whose threads look at it, too, lives on.
    """

    def __init__(self):
        super().__init__()
        self.looks_left = None
        self._thread = threading.get_ident()

    def now(self):
        if self.looks_left is not None and threading.get_ident() == self._thread:
            self.looks_left -= 1
            if self.looks_left <= 0:
                raise KilledError
        return super().now()

    def sleep(self, seconds):
        self.now()
        super().sleep(seconds)


@dataclasses.dataclass
class Trainer:
    """What is trained, seen from outside: so many seconds, of which a start keeps what it saved.

    Attributes:
      seconds: until it is done.
      period: between two checkpoints.
      ends: of starts to come: after how long they end early, with which statuses; then none does.
    """

    seconds: float = 3600.0
    period: float = 300.0
    ends: list = dataclasses.field(default_factory=list)
    saved: float = 0.0
    starts: int = 0


@dataclasses.dataclass
class _Life:
    """One start, on one set of machines."""

    number: int
    restarts: int
    began: float
    from_second: float
    end: float  # When it ends, and with what.
    statuses: list
    is_stopped: bool = False


class ToldWorkers:
    """Workers of machines whose every answer follows from the time; see `controller.Workers`."""

    fingerprint = "mine"

    def __init__(self, tpu, trainer, machines, troubles):
        self.tpu, self.trainer, self.troubles = tpu, trainer, troubles
        # What is on the machines goes when they do.
        self.machines = machines
        self.machines.setdefault("life", None)

    def _reach(self):
        self.tpu._advance()
        nodes = {name for name, (node, *_) in self.tpu.nodes.items() if node.state.name == "READY"}
        if not self.machines["nodes"] <= nodes or self.troubles():
            raise UnreachableError("worker 0: no route to host")

    def settle(self):
        """Takes down what the running start has saved by now, and whether it has ended."""
        life, now = self.machines["life"], self.tpu.clock.time
        if life is None:
            return None
        trained = min(now, life.end) - life.began
        steps = (life.from_second + trained) // self.trainer.period * self.trainer.period
        if now >= life.end and life.statuses in ([0, 0], [75, 75]):
            steps = life.from_second + trained
        self.trainer.saved = max(self.trainer.saved, steps)
        return life

    def prepare(self):
        self._reach()

    def look(self):
        self._reach()
        life = self.settle()
        if life is None:
            return [Start(), Start()]
        has_ended = self.tpu.clock.time >= life.end
        return [
            Start(
                life.number, status if has_ended else None, "mine", life.restarts, life.is_stopped
            )
            for status in life.statuses
        ]

    def start(self, number, restarts):
        self._reach()
        life = self.settle()
        if life is not None and number <= life.number:
            return
        trainer, now = self.trainer, self.tpu.clock.time
        if life is not None:
            assert now >= life.end, "two starts at once on the same machines"
        trainer.starts += 1
        left = trainer.seconds - trainer.saved
        after, statuses = trainer.ends.pop(0) if trainer.ends else (left, [0, 0])
        if after >= left:
            after, statuses = left, [0, 0]
        self.machines["life"] = _Life(
            number, restarts, now, trainer.saved, now + after, list(statuses)
        )

    def signal(self, number, name):
        self._reach()
        life = self.settle()
        if life is not None and life.number == number and self.tpu.clock.time < life.end:
            life.end = self.tpu.clock.time + 20
            life.statuses = [75, 75] if name == "TERM" else [-9, -9]


class World:
    """A service, a trainer, and controllers that are killed and started again."""

    def __init__(self, server, trainer=None, machines=MACHINES):
        self.clock = KillableClock()
        self.tpu = server.serve(FakeTpu(self.clock))
        self.client, self.machines = server.client, machines
        self.trainer = trainer or Trainer()
        self.unreachable = lambda: False
        self.said, self.controllers, self._rented = [], [], {}

    def _workers(self, resource):
        (queued,) = self.tpu.queued.values()
        mine = self._rented.setdefault(id(queued), {"queued": queued, "nodes": set(queued.nodes)})
        running = [
            rented["life"]
            for rented in self._rented.values()
            if rented is not mine
            and (life := rented.get("life"))
            and self.clock.time < life.end
            and rented["nodes"] & set(self.tpu.nodes)
            and rented["queued"] in self.tpu.queued.values()
        ]
        assert not running, "the job runs on other machines, too"
        return ToldWorkers(self.tpu, self.trainer, mine, lambda: self.unreachable())

    def controller(self, policy=POLICY, **given):
        cloud = cloud_tpu.CloudTpu(
            self.client, PLACE, machines=self.machines, workers=self._workers,
            clock=self.clock, say=self.said.append,
        )  # fmt: skip
        given = {"patience": PATIENCE, "clock": self.clock, "say": self.said.append} | given
        self.controllers.append(Controller(cloud, policy, **given))
        return self.controllers[-1]

    def run(self, **given):
        return self.controller(**given).run()
