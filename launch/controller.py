"""The life of a job on rented machines: rent, start, watch, give back, rent again; to an end.

It knows neither the cloud's protocol nor how workers are reached: `Cloud` and `Workers` are what it
needs of both. All that it remembers is there, too, so that one that is killed can be started again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol, TypeVar

from clipa_t5x.errors import UserError
from launch.clock import Clock, duration
from launch.job import RestartPolicy
from launch.restarts import Decision, Restarts

T = TypeVar("T")

# A process that left no word, as when its machine went down: as if killed.
GONE = -9

# So many short lives in a row on the same machines, and others are rented.
_SHORT_LIVES = 3

_WAITING = ("CREATING", "ACCEPTED", "PROVISIONING", "WAITING_FOR_RESOURCES", "STATE_UNSPECIFIED")
# Of nodes; all others come back, or are told from workers that cannot be reached.
_LOST_NODES = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "HIDDEN", "MISSING")


class RefusedError(UserError):
    """The service does not do what it is asked to, and says why; `is_quota`: there is no room."""

    def __init__(self, message: str, *, is_quota: bool = False):
        super().__init__(message)
        self.is_quota = is_quota


class OthersError(UserError):
    """Machines under the job's name that are somebody else's, and not to be given back."""


class ServiceError(UserError):
    """The service has not answered for so long that it is no passing trouble."""


class UnreachableError(Exception):
    """A worker could not be reached; whether it is gone, the service knows."""


@dataclasses.dataclass(frozen=True)
class Node:
    """One slice. `addresses` and `host_keys` are those of its workers; '' where not known."""

    name: str
    state: str
    addresses: tuple[str, ...] = ()
    host_keys: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Resource:
    """Machines of a job, as the service has them.

    Attributes:
      state: of the request for them.
      detail: what the service says of it.
      can_retry: whether a failed request may succeed another time.
      by_user: whether a person suspended it.
      restarts: how many there had been when it was asked for.
      nodes: the slices; once it is active.
    """

    state: str
    detail: str = ""
    can_retry: bool = True
    by_user: bool = False
    restarts: int = 0
    nodes: tuple[Node, ...] = ()


@dataclasses.dataclass(frozen=True)
class Start:
    """What a worker tells of the latest start of the job on it.

    Attributes:
      number: of the start, from 1; 0 where there was none.
      status: it ended with, None while it runs.
      command: fingerprint of what was started.
      restarts: how many there had been before it.
      is_stopped: whether somebody asked it to stop, for good.
    """

    number: int = 0
    status: int | None = 0
    command: str = ""
    restarts: int = 0
    is_stopped: bool = False


class Workers(Protocol):
    """All workers of the machines. Every method may raise UnreachableError, and be called again."""

    fingerprint: str

    def prepare(self) -> None:
        """Brings what is run. UserError: a worker cannot have it."""
        ...

    def look(self) -> Sequence[Start]:
        """Of every worker; shows what its log has that is new."""
        ...

    def start(self, number: int, restarts: int) -> None:
        """Starts the job on every worker on which that start was not begun yet."""
        ...

    def signal(self, number: int, name: str) -> None:
        """Sends a signal to what a start began, and to nothing else."""
        ...


class Cloud(Protocol):
    """The service. It passes over troubles that pass; raises RefusedError or ServiceError."""

    def find(self) -> Resource | None:
        """The job's machines, or request for them."""
        ...

    def create(self, restarts: int) -> None:
        """Asks for machines."""
        ...

    def delete(self) -> bool:
        """Asks for the deletion of whatever the job has; True once there is nothing."""
        ...

    def workers(self, resource: Resource) -> Workers:
        """Those of active machines."""
        ...


@dataclasses.dataclass(frozen=True)
class Patience:
    """Seconds.

    Attributes:
      poll: between looks at workers.
      check: between looks at the machines, and at a request that waits for them.
      active: for machines to be granted.
      reach: for workers that cannot be reached, while the service sees them well.
      peers: for the others when a worker's process has ended.
      stop: for processes asked to stop.
      delete: for machines to be gone.
    """

    poll: float = 10.0
    check: float = 30.0
    active: float = 7 * 24 * 3600.0
    reach: float = 900.0
    peers: float = 600.0
    stop: float = 900.0
    delete: float = 3600.0


class FailedError(UserError):
    """The job has ended, not done: why."""


class _StoppedError(Exception):
    """Somebody wants the job to end."""


class _LostError(Exception):
    """The machines are no more, or of no use."""


class Controller:
    """Takes one job to its end; see `run`."""

    def __init__(
        self,
        cloud: Cloud,
        policy: RestartPolicy,
        *,
        patience: Patience | None = None,
        clock: Clock | None = None,
        keep: bool = False,
        say: Callable[[str], None] = print,
    ):
        """Of a job.

        Args:
          cloud: the service.
          policy: when it is begun again.
          patience: how long for what.
          clock: also says whether to stop.
          keep: leaves the machines, whatever the end.
          say: is told what happens, in lines.
        """
        self._cloud, self._restarts = cloud, Restarts(policy)
        self._healthy_seconds = policy.healthy_seconds
        self._patience, self._clock = patience or Patience(), clock or Clock()
        self._keep, self._say = keep, say
        self._workers: Workers | None = None
        self._number, self._began, self._checked = 0, 0.0, 0.0
        self._was_active = self._has_asked = False

    @property
    def restarts(self) -> int:
        """How many there have been."""
        return self._restarts.count

    def run(self) -> bool:
        """Runs the job to its end; leaves no machines.

        Returns:
          Whether it is done; False where it was asked to stop, and goes on when run again.

        Raises:
          UserError: why it has ended otherwise.
        """
        try:
            try:
                is_done = self._run()
            except _StoppedError:
                self._halt()
                is_done = False
        except OthersError:
            raise
        except BaseException:
            try:
                self._give_back()
            except UserError as error:  # What ended the job is told in its place.
                self._say(str(error))
            raise
        self._give_back()
        return is_done

    def _give_back(self) -> None:
        if self._has_asked and not self._keep:
            self._delete()

    def _run(self) -> bool:
        while True:
            try:
                delay = self._occupy()
            except _LostError as lost:
                delay = self._delay(self._restarts.again(self._lived(), str(lost)), str(lost))
            if delay is None:
                return True
            self._delete()
            self._wait(delay)

    def _lived(self) -> float:
        """Seconds since the job was started; 0 before."""
        return self._clock.now() - self._began if self._number else 0.0

    def _occupy(self) -> float | None:
        """Has machines, and the job on them, until it is done (None) or needs others (seconds)."""
        resource = self._acquire()
        workers = self._workers = self._cloud.workers(resource)
        self._insist(workers.prepare)
        self._adopt(resource)
        short_lives = 0
        while True:
            statuses, lived = self._attend(), self._lived()
            delay = self._delay(self._restarts.after(statuses, lived), f"statuses {statuses}")
            if delay is None:
                return None
            short_lives = short_lives + 1 if lived < self._healthy_seconds else 0
            if short_lives >= _SHORT_LIVES:
                self._say(f"{short_lives} short lives on these machines: others are rented.")
                return delay
            self._wait(delay)
            if any(start.is_stopped for start in self._insist(workers.look)):
                raise _StoppedError
            self._start(self._number + 1)

    def _delay(self, decision: Decision, reason: str) -> float | None:
        if decision.failure:
            raise FailedError(decision.failure)
        if decision.delay is not None:
            self._say(f"{reason}: restart {self.restarts}, in {decision.delay:.0f} s.")
        return decision.delay

    def _acquire(self) -> Resource:
        """Active machines, those that there are or new ones."""
        asked = self._clock.now()
        resource = self._cloud.find()
        self._has_asked = True
        if resource is None or resource.state == "DELETING":
            self._delete()
            self._create()
            resource = self._cloud.find()
        else:
            self._restarts.count = max(self.restarts, resource.restarts)
            self._say(f"Machines of this job are there ({resource.state}): it goes on with them.")
        seen = ""
        while resource is None or resource.state in _WAITING:
            waited = self._clock.now() - asked
            if resource and resource.state != seen:
                seen = resource.state
                self._say(f"Machines: {seen}, after {duration(waited)}.")
            if waited > self._patience.active:
                raise FailedError(
                    f"no machines after {duration(waited)} ({seen}): try another zone, or wait "
                    "longer (--max_wait_hours)"
                )
            self._wait(self._patience.check)
            resource = self._cloud.find()
            # A request that was just made may take a moment to be seen.
            if resource is None and (seen or waited > self._patience.reach):
                break
        self._refuse_lost(resource)
        assert resource is not None
        self._say(f"Machines: ACTIVE, after {duration(self._clock.now() - asked)}.")
        self._was_active, self._checked = True, self._clock.now()
        return resource

    def _create(self) -> None:
        try:
            self._cloud.create(self.restarts)
        except RefusedError as refused:
            # What was given back a moment ago may still count; then it will not for long.
            if not (refused.is_quota and self._was_active):
                raise
            raise _LostError(str(refused)) from refused

    def _refuse_lost(self, resource: Resource | None) -> None:
        """Raises what it means that machines are in that state, unless they are well."""
        if resource is None or resource.state == "DELETING":
            raise FailedError("somebody deleted the job's machines; run it again to go on")
        state, detail = resource.state, resource.detail
        if state in ("SUSPENDED", "SUSPENDING", "FAILED"):
            text = f"machines {state}" + (f": {detail}" if detail else "")
            if state != "FAILED":
                if resource.by_user:
                    raise FailedError(f"somebody suspended the job's machines ({text})")
            elif not resource.can_retry:
                raise FailedError(text)
            raise _LostError(text)
        for node in resource.nodes:
            if node.state in _LOST_NODES:
                raise _LostError(f"node {node.name} {node.state}")

    def _check(self) -> None:
        """Looks at the machines, if it is time to."""
        if self._clock.now() - self._checked >= self._patience.check:
            self._refuse_lost(self._cloud.find())
            self._checked = self._clock.now()

    def _insist(self, action: Callable[[], T]) -> T:
        """Does something on all workers, while they are there."""
        began = self._clock.now()
        while True:
            try:
                return action()
            except UnreachableError as error:
                self._refuse_lost(self._cloud.find())
                tried = self._clock.now() - began
                if tried > self._patience.reach:
                    text = f"workers could not be reached for {duration(tried)} ({error})"
                    raise _LostError(text) from error
                self._wait(self._patience.poll)

    def _adopt(self, resource: Resource) -> None:
        """Goes on with what workers already do, or starts."""
        workers = self._workers
        assert workers is not None
        starts = self._insist(workers.look)
        number = max(start.number for start in starts)
        latest = [start for start in starts if start.number == number]
        if number == 0:
            self._start(1)
            return
        is_running = any(start.status is None for start in latest)
        is_same = all(start.command == workers.fingerprint for start in latest)
        if is_running and not is_same:
            raise OthersError(
                "these machines are busy with another command under this name: stop that "
                "(python -m launch.gce stop), or choose another --name"
            )
        if not is_same or (not is_running and any(start.is_stopped for start in latest)):
            self._start(number + 1)
            return
        self._restarts.count = max(self.restarts, *(start.restarts for start in latest))
        self._say(f"Start {number} of this job is there: it goes on with that.")
        self._start(number)

    def _start(self, number: int) -> None:
        """Starts, where it has not been, and takes the time."""
        workers = self._workers
        assert workers is not None
        self._number, self._began = number, self._clock.now()
        self._insist(lambda: workers.start(number, self.restarts))

    def _attend(self) -> list[int]:
        """Watches a start until all its processes have ended; their statuses."""
        workers, number = self._workers, self._number
        assert workers is not None
        first_end, told = None, ""
        while True:
            starts = self._insist(workers.look)
            statuses = [s.status if s.number == number else GONE for s in starts]
            ended = [status for status in statuses if status is not None]
            if len(ended) == len(statuses):
                if any(start.is_stopped for start in starts):
                    raise _StoppedError
                return ended
            now = self._clock.now()
            if ended:
                first_end = now if first_end is None else first_end
                told = self._end_others(now - first_end, told)
            self._check()
            self._wait(self._patience.poll)

    def _end_others(self, waited: float, told: str) -> str:
        """Has the others of an ended process end: on their own, when asked, when made to."""
        workers, number = self._workers, self._number
        assert workers is not None
        patience = self._patience
        if waited > patience.peers + patience.stop:
            name = "KILL"
        else:
            name = "TERM" if waited > patience.peers else ""
        if name != told:
            self._insist(lambda: workers.signal(number, name))
        return name

    def _wait(self, seconds: float) -> None:
        self._clock.sleep(seconds)
        if self._clock.is_stopping:
            raise _StoppedError

    def _halt(self) -> None:
        """Has running processes save and end, where there are any."""
        workers, number = self._workers, self._number
        if workers is None or number == 0:
            return
        self._say("Asked to stop: the job saves what it has done.")
        end = self._clock.now() + self._patience.stop
        is_told = False
        while self._clock.now() < end:
            try:
                if not is_told:
                    workers.signal(number, "TERM")
                    is_told = True
                if all(start.status is not None for start in workers.look()):
                    return
            except UnreachableError:
                resource = self._cloud.find()
                if resource is None or resource.state != "ACTIVE":
                    return
            self._clock.sleep(self._patience.poll)
        self._say(f"It has not ended after {duration(self._patience.stop)}.")

    def _delete(self) -> None:
        """Gives the machines back, and waits until there are none."""
        self._workers, self._number = None, 0
        began = self._clock.now()
        while not self._cloud.delete():
            if self._clock.now() - began > self._patience.delete:
                _raise_undeleted(duration(self._patience.delete))
            self._clock.sleep(self._patience.poll)


def _raise_undeleted(waited: str) -> NoReturn:
    raise FailedError(
        f"the job's machines are still there {waited} after their deletion was asked for, and may "
        "cost: see to it (python -m launch.gce delete)"
    )
