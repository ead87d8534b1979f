"""Queued resources of Cloud TPU: machines of one job, asked for, looked at and deleted.

By the official client, version 2 of the service, which is its stable one. A job has at most one
queued resource, for its id is the job's name and the service knows each id once; its nodes carry
the job's name as a label. Nothing is remembered elsewhere.
"""

import contextlib
import dataclasses
import re
import uuid
from collections.abc import Callable
from typing import Any, NoReturn

from clipa_t5x.errors import UserError
from clipa_t5x.topologies import Topology
from launch.clock import Clock, duration
from launch.controller import Node, OthersError, RefusedError, Resource, ServiceError, Workers
from launch.meter import Meter

try:
    from google.api_core import exceptions  # pyright: ignore[reportMissingImports]
    from google.auth.exceptions import GoogleAuthError  # pyright: ignore[reportMissingImports]
    from google.cloud import tpu_v2  # pyright: ignore
except ImportError as error:
    raise UserError(
        "launch.gce needs Google's client: pip install 'clipa_t5x[gce]' --constraint "
        "constraints.txt"
    ) from error

# Of a kind: what the service calls it, its name's unit in a chip, and the software of its machines
# (https://cloud.google.com/tpu/docs/runtimes).
_KINDS = {
    "v4": ("v4", 2, "tpu-ubuntu2204-base"),
    "v5e": ("v5litepod", 1, "v2-alpha-tpuv5-lite"),
    "v5p": ("v5p", 2, "v2-alpha-tpuv5"),
    "v6e": ("v6e", 1, "v2-alpha-tpuv6e"),
}

JOB_LABEL, RESTARTS_LABEL = "clipa_t5x-job", "clipa_t5x-restarts"
CHIP_SECONDS_LABEL = "clipa_t5x-chip-seconds"  # Of machines before these.
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
_CALL_SECONDS = 60.0
_RETRY_SECONDS, _MOST_RETRY_SECONDS, _GIVE_UP_SECONDS = 5.0, 60.0, 1800.0
_OPERATION_SECONDS = 600.0

# What passes by itself. The client makes exceptions of statuses.
_PASSING = (
    exceptions.ServiceUnavailable,
    exceptions.DeadlineExceeded,
    exceptions.InternalServerError,
    exceptions.Unknown,
    exceptions.Aborted,
    exceptions.Cancelled,
)
_FOR_CALLERS = (exceptions.NotFound, exceptions.FailedPrecondition)
# Codes of google.rpc.Status that another attempt does not mend: INVALID_ARGUMENT, NOT_FOUND,
# PERMISSION_DENIED, FAILED_PRECONDITION, OUT_OF_RANGE, UNIMPLEMENTED, UNAUTHENTICATED.
_LASTING_CODES = (3, 5, 7, 9, 11, 12, 16)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a job's machines are, and under what name."""

    project: str
    zone: str
    name: str

    def __post_init__(self):
        for field in ("project", "zone"):
            value = getattr(self, field)
            if not re.fullmatch(r"[a-z][a-z0-9.:-]*", value):
                raise UserError(f"--{field} is {value!r}: it takes a {field}'s id.")

    @property
    def parent(self) -> str:
        """The service's name of project and zone."""
        return f"projects/{self.project}/locations/{self.zone}"

    @property
    def resource(self) -> str:
        """The service's name of the queued resource."""
        return f"{self.parent}/queuedResources/{self.name}"


@dataclasses.dataclass(frozen=True)
class Machines:
    """What is asked for.

    Attributes:
      accelerator_type: as the service names it, of one slice.
      runtime_version: their software.
      num_slices: how many.
      tier: 'on-demand', 'spot' or 'reserved'.
      reservation: its id, '-' for any of the project's.
      service_account: what they act as; '' for the project's default one.
      network: '' for the default one.
      subnetwork: '' for the default one.
      internal_ips: gives them no address in the internet.
      ssh_keys: who may log in: 'USER:PUBLIC KEY', a line each.
    """

    accelerator_type: str
    runtime_version: str
    num_slices: int = 1
    tier: str = "on-demand"
    reservation: str = "-"
    service_account: str = ""
    network: str = ""
    subnetwork: str = ""
    internal_ips: bool = False
    ssh_keys: str = ""


def accelerator(topology: Topology) -> tuple[str, str]:
    """What Cloud TPU calls a topology, whose number counts chips, and its machines' software.

    Raises:
      UserError: Cloud TPU does not have it.
    """
    if topology.kind.name not in _KINDS:
        raise UserError(
            f"--topology is {topology.name}: Cloud TPU's queued resources have "
            f"{', '.join(_KINDS)} (tpu7x is rented by way of Kubernetes alone)."
        )
    prefix, per_chip, runtime_version = _KINDS[topology.kind.name]
    return f"{prefix}-{topology.num_chips * per_chip}", runtime_version


def creation(
    place: Place, machines: Machines, restarts: int, chip_seconds: float = 0.0
) -> tpu_v2.CreateQueuedResourceRequest:
    """The request for machines of a job that has had others for so many chip-seconds."""
    metadata = {"enable-guest-attributes": "TRUE"}  # There they tell their SSH host keys.
    if machines.ssh_keys:
        metadata["ssh-keys"] = machines.ssh_keys
    node = tpu_v2.Node(
        accelerator_type=machines.accelerator_type,
        runtime_version=machines.runtime_version,
        network_config=tpu_v2.NetworkConfig(
            network=machines.network,
            subnetwork=machines.subnetwork,
            enable_external_ips=not machines.internal_ips,
        ),
        service_account=tpu_v2.ServiceAccount(email=machines.service_account, scope=[_SCOPE]),
        labels={
            JOB_LABEL: place.name,
            RESTARTS_LABEL: str(restarts),
            CHIP_SECONDS_LABEL: f"{chip_seconds:.0f}",
        },
        metadata=metadata,
    )
    spec = tpu_v2.QueuedResource.Tpu.NodeSpec(parent=place.parent, node=node)
    if machines.num_slices > 1:
        spec.multislice_params.node_count = machines.num_slices
        spec.multislice_params.node_id_prefix = place.name
    else:
        spec.node_id = place.name
    resource = tpu_v2.QueuedResource(tpu=tpu_v2.QueuedResource.Tpu(node_spec=[spec]))
    if machines.tier == "spot":
        resource.spot = tpu_v2.QueuedResource.Spot()
    elif machines.tier == "reserved":
        resource.reservation_name = f"{place.parent}/reservations/{machines.reservation}"
    return tpu_v2.CreateQueuedResourceRequest(
        parent=place.parent, queued_resource_id=place.name, queued_resource=resource
    )


def connect() -> tpu_v2.TpuClient:
    """A client with the user's credentials.

    Raises:
      UserError: there are none.
    """
    try:
        return tpu_v2.TpuClient()
    except GoogleAuthError as error:
        _raise_unauthenticated(error)


def _raise_unauthenticated(error: Exception) -> NoReturn:
    raise UserError(
        f"no credentials for Google Cloud: {_line(error)} (run: gcloud auth application-default "
        "login; nothing was asked for)"
    ) from error


def _line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _made(node: Any) -> float:
    """When, in seconds since 1970: a datetime, whatever its type says."""
    return node.create_time.timestamp()


class CloudTpu:
    """The machines of one job; see `controller.Cloud`."""

    def __init__(
        self,
        client: tpu_v2.TpuClient,
        place: Place,
        *,
        machines: Machines | None = None,
        workers: Callable[[Resource], Workers] | None = None,
        clock: Clock | None = None,
        say: Callable[[str], None] = print,
    ):
        """Of a job.

        Args:
          client: of version 2.
          place: where, and its name.
          machines: to ask for; None where there are to be no new ones.
          workers: makes what reaches the workers of active machines.
          clock: waits between attempts.
          say: is told of troubles.
        """
        self._client, self._place, self._machines = client, place, machines
        self._workers = workers
        self._clock, self._say = clock or Clock(), say
        self.meter = Meter()

    def workers(self, resource: Resource) -> Workers:
        """See `controller.Cloud`."""
        assert self._workers is not None
        return self._workers(resource)

    def find(self) -> Resource | None:
        """See `controller.Cloud`.

        Raises:
          OthersError: under the job's name is something that is none of this launcher's, or of
            another kind.
        """
        queued = self._get("queued_resource", self._place.resource)
        if queued is None:
            return None
        labels = self._labels(queued)
        if self._machines is not None:
            self._refuse_others(queued, self._machines)
        self.meter.carry(float(labels.get(CHIP_SECONDS_LABEL, 0)))
        state = queued.state.state.name
        error = queued.state.failed_data.error
        return Resource(
            state=state,
            detail=_line(error.message),
            can_retry=error.code not in _LASTING_CODES,
            by_user=queued.state.state_initiator.name == "USER",
            restarts=int(labels.get(RESTARTS_LABEL, 0)),
            nodes=self._nodes(queued) if state == "ACTIVE" else (),
        )

    def chip_hours(self) -> tuple[float, float]:
        """Hours since the first of the job's present nodes was made, and chip-hours of them all."""
        nodes = self._own_nodes()
        now = self._clock.unix_time()
        hours = max([(now - _made(node)) / 3600 for node in nodes], default=0.0)
        return max(hours, 0.0), sum(map(self._see, nodes)) / 3600

    def _see(self, node: tpu_v2.Node) -> float:
        """Chip-seconds of a node, which count from now on."""
        prefix, _, size = node.accelerator_type.rpartition("-")
        per_chip = {prefix: cores for prefix, cores, _ in _KINDS.values()}
        chips = int(size) / per_chip[prefix]
        return self.meter.see(node.name, _made(node), chips, self._clock.unix_time())

    def create(self, restarts: int) -> None:
        """See `controller.Cloud`."""
        assert self._machines is not None
        self.meter.begin()
        request = creation(self._place, self._machines, restarts, self.meter.chip_seconds)
        # Asked for again after an answer that was lost, it is the same request.
        request.request_id = str(uuid.uuid4())
        try:
            operation = self._call("create_queued_resource", request).operation
        except exceptions.AlreadyExists:
            return  # An answer was lost, or somebody was faster: `find` tells whose it is.
        self._await(operation)

    def delete(self) -> bool:
        """See `controller.Cloud`."""
        queued = self._get("queued_resource", self._place.resource)
        if queued is not None:
            self._labels(queued)
            if queued.state.state.name != "DELETING":
                request = {"name": self._place.resource, "force": True}
                self._ask_deletion("delete_queued_resource", request)
            return False
        nodes = self._own_nodes()
        for node in nodes:
            if node.state.name != "DELETING":
                self._ask_deletion("delete_node", {"name": node.name})
        return not nodes

    def host_keys(self, node: str) -> tuple[str, ...]:
        """SSH host keys of a node's workers, 'ssh-ed25519 KEY'; '' where they do not tell."""
        request = {"name": f"{self._place.parent}/nodes/{node}"}
        try:
            answer = self._call("get_guest_attributes", request)
        except (exceptions.NotFound, exceptions.FailedPrecondition, RefusedError):
            return ()
        return tuple(
            next((f"{e.key} {e.value}" for e in w.query_value.items if e.key == "ssh-ed25519"), "")
            for w in answer.guest_attributes
        )

    def _labels(self, queued: tpu_v2.QueuedResource) -> dict[str, str]:
        """Labels of a queued resource, which must be the job's."""
        labels = dict(queued.tpu.node_spec[0].node.labels) if queued.tpu.node_spec else {}
        if labels.get(JOB_LABEL) != self._place.name:
            raise OthersError(
                f"the queued resource {self._place.resource} is none of launch.gce's: choose "
                "another --name."
            )
        return labels

    def _refuse_others(self, queued: tpu_v2.QueuedResource, machines: Machines) -> None:
        spec = queued.tpu.node_spec[0]
        has = (max(spec.multislice_params.node_count, 1), spec.node.accelerator_type)
        if has != (machines.num_slices, machines.accelerator_type):
            raise OthersError(
                f"job {self._place.name} has {has[0]} x {has[1]}, and {machines.num_slices} x "
                f"{machines.accelerator_type} are asked for: delete those (python -m launch.gce "
                "delete), or choose another --name."
            )

    def _nodes(self, queued: tpu_v2.QueuedResource) -> tuple[Node, ...]:
        """The slices of an active request, in their order."""
        spec = queued.tpu.node_spec[0]
        count = spec.multislice_params.node_count
        names = [f"{self._place.name}-{i}" for i in range(count)] if count else [spec.node_id]
        nodes = []
        for name in names:
            node = self._get("node", f"{self._place.parent}/nodes/{name}")
            if node is None:
                nodes.append(Node(name, "MISSING"))
                continue
            self._see(node)
            ends = node.network_endpoints
            inside = not node.network_config.enable_external_ips
            addresses = (e.ip_address if inside else e.access_config.external_ip for e in ends)
            nodes.append(Node(name, node.state.name, tuple(addresses)))
        return tuple(nodes)

    def _own_nodes(self) -> list[tpu_v2.Node]:
        """All nodes with the job's label."""
        try:
            nodes = list(self._call("list_nodes", {"parent": self._place.parent}))
        except exceptions.NotFound:  # The zone; so it has none.
            return []
        return [node for node in nodes if node.labels.get(JOB_LABEL) == self._place.name]

    def _get(self, kind: str, name: str) -> Any:
        try:
            return self._call(f"get_{kind}", {"name": name})
        except exceptions.NotFound:
            return None

    def _ask_deletion(self, method: str, request: dict) -> None:
        # Gone already, or busy: whoever asks looks again.
        with contextlib.suppress(*_FOR_CALLERS):
            self._call(method, request)

    def _await(self, operation: Any) -> None:
        """Waits until a request is taken or refused."""
        began = self._clock.now()
        while not operation.done and self._clock.now() - began < _OPERATION_SECONDS:
            self._clock.sleep(_RETRY_SECONDS)
            try:
                operation = self._call("get_operation", {"name": operation.name})
            except exceptions.NotFound:
                return
        if operation.HasField("error"):
            error = exceptions.from_grpc_status(operation.error.code, operation.error.message)
            if not isinstance(error, exceptions.AlreadyExists):
                self._raise_refused("create_queued_resource", error)

    def _call(self, method: str, request: Any) -> Any:
        """Calls the service until it answers.

        Raises:
          NotFound, AlreadyExists, FailedPrecondition: for the caller.
          RefusedError: it will not.
          ServiceError: it did not answer for very long.
        """
        began, delay = self._clock.now(), _RETRY_SECONDS
        while True:
            try:
                answer = getattr(self._client, method)(request=request, timeout=_CALL_SECONDS)
                return list(answer) if method.startswith("list_") else answer
            except GoogleAuthError as error:
                _raise_unauthenticated(error)
            except exceptions.GoogleAPICallError as error:
                self._refuse_lasting(method, error)
                tried = self._clock.now() - began
                if tried > _GIVE_UP_SECONDS:
                    raise ServiceError(
                        f"Cloud TPU has not answered for {duration(tried)}: {_line(error)} (see "
                        "what there is: python -m launch.gce status)"
                    ) from error
                self._say(f"Cloud TPU: {_line(error)}: once more in {delay:.0f} s.")
                self._clock.sleep(delay)
                delay = min(2 * delay, _MOST_RETRY_SECONDS)

    def _refuse_lasting(self, method: str, error: exceptions.GoogleAPICallError) -> None:
        """Raises what another attempt does not mend."""
        if "Getting metadata from plugin failed" in str(error):  # gRPC's words for it.
            _raise_unauthenticated(error)
        is_creation = method == "create_queued_resource"
        if isinstance(error, _PASSING):
            return
        if isinstance(error, exceptions.ResourceExhausted) and not is_creation:
            return  # So many requests a minute.
        if isinstance(error, exceptions.AlreadyExists):
            raise error
        if isinstance(error, _FOR_CALLERS) and not is_creation:
            raise error
        self._raise_refused(method, error)

    def _raise_refused(self, method: str, error: exceptions.GoogleAPICallError) -> NoReturn:
        """The service's own words, and what to do."""
        place, machines = self._place, self._machines
        asked = f"{machines.num_slices} x {machines.accelerator_type}" if machines else ""
        is_quota = isinstance(error, exceptions.ResourceExhausted)
        if is_quota:
            remedy = (
                f"ask for quota of the TPU API in {place.zone} (console: IAM & Admin > Quotas), or "
                "take another zone, topology or tier"
            )
        elif isinstance(error, exceptions.PermissionDenied | exceptions.Unauthenticated):
            remedy = (
                f"is the TPU API enabled in {place.project}, and have you roles/tpu.admin there "
                "and roles/iam.serviceAccountUser of the service account?"
            )
        else:
            remedy = (
                f"what {place.zone} has: gcloud compute tpus accelerator-types list "
                f"--project={place.project} --zone={place.zone}; its software: runtime-versions "
                "list"
            )
        what = method.replace("_", " ") + (f" of {asked}" if asked else "")
        what = f"{what} in {place.zone}"
        code = error.grpc_status_code.name if error.grpc_status_code else error.code
        raise RefusedError(
            f"Cloud TPU refuses to {what}: {code}: {_line(error.message)} ({remedy})",
            is_quota=is_quota,
        ) from error
