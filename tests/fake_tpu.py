"""Cloud TPU as a gRPC service on this machine: its messages, its states, its troubles.

What a request asks for happens at once or later, by a clock that a test may turn; the official
client talks to it as to the real one.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import threading

import grpc
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport
from google.longrunning import operations_pb2
from google.protobuf import any_pb2
from google.rpc import status_pb2

State = tpu_v2.QueuedResourceState.State
NodeState = tpu_v2.Node.State


class TurnedClock:
    """A clock that a sleep turns."""

    def __init__(self):
        self.time = 0.0
        self.is_stopping = False

    def now(self):
        return self.time

    def unix_time(self):
        return 1.7e9 + self.time

    def sleep(self, seconds):
        self.time += seconds

    def stop(self):
        self.is_stopping = True


@dataclasses.dataclass
class Fate:
    """Of one request for machines; seconds are from the moment before.

    Attributes:
      refusal: status code and message of the answer to the request.
      operation_error: code and message of the operation that the answer names.
      waits: until it is granted.
      failure: code and message that it fails with where it would have been granted.
      provisions: until the machines are there.
      preempted: they are, after so long.
      how: 'SUSPENDED', or what state a node gets: 'PREEMPTED', ...; or 'gone' of the node alone.
      deletes: takes so long.
      orphans: whether its nodes stay when it is deleted, until they are deleted, too.
    """

    refusal: tuple | None = None
    operation_error: tuple | None = None
    waits: float = 0.0
    failure: tuple | None = None
    provisions: float = 0.0
    preempted: float | None = None
    how: str = "SUSPENDED"
    deletes: float = 0.0
    orphans: bool = False


class _Queued:
    def __init__(self, message, fate, now):
        self.message, self.fate, self.made = message, fate, now
        self.deleted = None
        self.nodes = {}


class FakeTpu:
    """The service. Tests read and set its public attributes.

    Attributes:
      fates: of requests to come, the first first; then of all others `Fate()`.
      troubles: called with a method's name; a status code to fail with, and whether before ('ask')
        or after ('answer') it was done; or None.
      calls: how often each method was called.
      most_live: queued resources that there were at once.
      zone: the one that there is.
      num_workers: of a slice.
      mistakes: what was raised here that is no answer.
    """

    def __init__(self, clock):
        self.clock = clock
        self.fates = collections.deque()
        self.troubles = lambda method: None
        self.calls = collections.Counter()
        self.queued, self.nodes, self.operations, self.seen = {}, {}, {}, {}
        self.most_live = 0
        self.zone = "projects/p/locations/us-east5-b"
        self.num_workers = 2
        self.host_keys = True
        self.mistakes = []
        self._lock = threading.RLock()

    @property
    def left(self):
        """Names of all that there is."""
        self._advance()
        return [*self.queued, *self.nodes]

    # What happens by itself.

    def _advance(self):
        for name, queued in list(self.queued.items()):
            self._advance_one(name, queued)
        for name, (_, deleted, seconds) in list(self.nodes.items()):
            if deleted is not None and self.clock.now() >= deleted + seconds:
                del self.nodes[name]

    def _advance_one(self, name, queued):
        now, fate, state = self.clock.now(), queued.fate, queued.message.state
        if queued.deleted is not None:
            if now >= queued.deleted + fate.deletes:
                del self.queued[name]
                if not fate.orphans:
                    for node in queued.nodes:
                        self.nodes.pop(node, None)
            return
        granted = queued.made + fate.waits
        active = granted + fate.provisions
        if state.state == State.WAITING_FOR_RESOURCES and now >= granted:
            if fate.failure:
                code, text = fate.failure
                state.failed_data.error = status_pb2.Status(code=code.value[0], message=text)
                state.state = State.FAILED
                return
            state.state = State.PROVISIONING
        if state.state == State.PROVISIONING and now >= active:
            state.state = State.ACTIVE
            self._make_nodes(queued)
        if (
            state.state == State.ACTIVE
            and fate.preempted is not None
            and now >= active + fate.preempted
        ):
            self.preempt(queued)

    def preempt(self, queued):
        """Takes the machines away."""
        how, fate = queued.fate.how, queued.fate
        queued.fate = dataclasses.replace(fate, preempted=None)
        if how == "SUSPENDED":
            queued.message.state.state = State.SUSPENDED
            queued.message.state.state_initiator = tpu_v2.QueuedResourceState.StateInitiator.SERVICE
            for node in queued.nodes:
                self.nodes.pop(node, None)
            return
        node = next(iter(queued.nodes))
        if how == "gone":
            self.nodes.pop(node, None)
        elif node in self.nodes:
            self.nodes[node][0].state = NodeState[how]

    def _make_nodes(self, queued):
        spec = queued.message.tpu.node_spec[0]
        count = spec.multislice_params.node_count
        prefix = spec.multislice_params.node_id_prefix
        for i, name in enumerate([f"{prefix}-{i}" for i in range(count)] or [spec.node_id]):
            node = tpu_v2.Node(spec.node)
            node.name = f"{spec.parent}/nodes/{name}"
            node.state = NodeState.READY
            made = self.clock.unix_time()
            node.create_time = datetime.datetime.fromtimestamp(made, datetime.UTC)
            node.network_endpoints = [
                tpu_v2.NetworkEndpoint(
                    ip_address=f"10.0.{i}.{j}",
                    access_config=tpu_v2.AccessConfig(external_ip=f"34.0.{i}.{j}"),
                )
                for j in range(self.num_workers)
            ]
            queued.nodes[node.name] = None
            self.nodes[node.name] = [node, None, 0.0]

    # The methods.

    def _place(self, name, context):
        if not f"{name}/".startswith(f"{self.zone}/"):
            context.abort(grpc.StatusCode.NOT_FOUND, f"Location {name.split('/')[3]} is not found.")

    def _one(self, kind, name, context):
        self._place(name, context)
        if name not in kind:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Resource '{name}' was not found")
        return kind[name]

    def create_queued_resource(self, request, context):
        self._place(request.parent, context)
        if request.request_id in self.seen:
            return self.operations[self.seen[request.request_id]]
        name = f"{request.parent}/queuedResources/{request.queued_resource_id}"
        nodes = {n for n in self.nodes if n.rpartition("/")[2].startswith(name.rpartition("/")[2])}
        if name in self.queued or nodes:
            context.abort(grpc.StatusCode.ALREADY_EXISTS, f"Resource '{name}' already exists")
        fate = self.fates.popleft() if self.fates else Fate()
        if fate.refusal:
            context.abort(*fate.refusal)
        operation = operations_pb2.Operation(name=f"{request.parent}/operations/{len(self.seen)}")
        self.seen[request.request_id] = operation.name
        self.operations[operation.name] = operation
        if fate.operation_error:
            code, text = fate.operation_error
            operation.done = True
            operation.error.CopyFrom(status_pb2.Status(code=code.value[0], message=text))
            return operation
        message = tpu_v2.QueuedResource(request.queued_resource)
        message.name = name
        message.state.state = State.WAITING_FOR_RESOURCES
        self.queued[name] = _Queued(message, fate, self.clock.now())
        self.most_live = max(self.most_live, len(self.queued))
        answer = any_pb2.Any()
        answer.Pack(tpu_v2.QueuedResource.pb(message))
        # The answer comes before it is done; whoever asks for the operation finds it done.
        unfinished = operations_pb2.Operation(name=operation.name)
        operation.done = True
        operation.response.CopyFrom(answer)
        return unfinished

    def get_queued_resource(self, request, context):
        return self._one(self.queued, request.name, context).message

    def delete_queued_resource(self, request, context):
        queued = self._one(self.queued, request.name, context)
        if queued.deleted is not None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "It is being deleted already.")
        state = queued.message.state.state
        if not request.force and queued.nodes and state != State.SUSPENDED:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "It has nodes.")
        queued.message.state.state = State.DELETING
        queued.deleted = self.clock.now()
        return operations_pb2.Operation(name=f"{self.zone}/operations/deletion", done=True)

    def list_queued_resources(self, request, context):
        self._place(request.parent, context)
        return tpu_v2.ListQueuedResourcesResponse(
            queued_resources=[queued.message for queued in self.queued.values()]
        )

    def get_node(self, request, context):
        return self._one(self.nodes, request.name, context)[0]

    def list_nodes(self, request, context):
        """One a page."""
        self._place(request.parent, context)
        nodes, at = [node for node, *_ in self.nodes.values()], int(request.page_token or 0)
        more = f"{at + 1}" if at + 1 < len(nodes) else ""
        return tpu_v2.ListNodesResponse(nodes=nodes[at : at + 1], next_page_token=more)

    def delete_node(self, request, context):
        entry = self._one(self.nodes, request.name, context)
        if entry[1] is not None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "It is being deleted already.")
        entry[0].state = NodeState.DELETING
        entry[1:] = [self.clock.now(), 30.0]
        return operations_pb2.Operation(name=f"{self.zone}/operations/deletion", done=True)

    def get_guest_attributes(self, request, context):
        self._one(self.nodes, request.name, context)
        if not self.host_keys:
            context.abort(grpc.StatusCode.NOT_FOUND, "There are no guest attributes.")
        entries = [
            tpu_v2.GuestAttributes(
                query_value=tpu_v2.GuestAttributesValue(
                    items=[tpu_v2.GuestAttributesEntry(key="ssh-ed25519", value=f"AAAA{i}")]
                )
            )
            for i in range(self.num_workers)
        ]
        return tpu_v2.GetGuestAttributesResponse(guest_attributes=entries)

    def get_operation(self, request, context):
        if request.name not in self.operations:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no operation {request.name}")
        return self.operations[request.name]

    # How it is reached.

    def _method(self, name, kind, answer):
        method = getattr(self, name)

        def call(request, context):
            with self._lock:
                self.calls[name] += 1
                code, when = self.troubles(name) or (None, "")
                if when == "ask":
                    context.abort(code, "Trouble before it was done.")
                try:
                    self._advance()
                    result = method(request, context)
                    self._advance()
                except Exception as error:
                    if context.code() is None:  # It is no answer, but a mistake in here.
                        self.mistakes.append(error)
                    raise
                if when == "answer":
                    context.abort(code, "Trouble after it was done.")
                return result

        operation = operations_pb2.Operation
        return grpc.unary_unary_rpc_method_handler(
            call,
            request_deserializer=getattr(kind, "deserialize", None) or kind.FromString,
            response_serializer=operation.SerializeToString
            if answer is operation
            else answer.serialize,
        )

    def _handlers(self):
        operation = operations_pb2.Operation
        methods = {
            "create_queued_resource": operation,
            "delete_queued_resource": operation,
            "delete_node": operation,
            "get_queued_resource": tpu_v2.QueuedResource,
            "get_node": tpu_v2.Node,
            "list_nodes": tpu_v2.ListNodesResponse,
            "list_queued_resources": tpu_v2.ListQueuedResourcesResponse,
            "get_guest_attributes": tpu_v2.GetGuestAttributesResponse,
        }
        handlers = {}
        for name, answer in methods.items():
            title = "".join(word.title() for word in name.split("_"))
            kind = getattr(tpu_v2, f"{title}Request")
            handlers[title] = self._method(name, kind, answer)
        kind = operations_pb2.GetOperationRequest
        return (
            grpc.method_handlers_generic_handler("google.cloud.tpu.v2.Tpu", handlers),
            grpc.method_handlers_generic_handler(
                "google.longrunning.Operations",
                {"GetOperation": self._method("get_operation", kind, operation)},
            ),
        )


class Server:
    """Serves one FakeTpu after the other, at one address; `tpu` is the one that answers."""

    def __init__(self):
        self.tpu = None
        self._handlers = ()
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(2), handlers=[self])
        port = self._server.add_insecure_port("localhost:0")
        self._server.start()
        self._channel = grpc.insecure_channel(f"localhost:{port}")
        self.client = tpu_v2.TpuClient(transport=TpuGrpcTransport(channel=self._channel))

    def service(self, details):
        """The method of a call; see grpc.GenericRpcHandler."""
        found = (handler.service(details) for handler in self._handlers)
        return next(filter(None, found), None)

    def serve(self, tpu):
        self.tpu, self._handlers = tpu, tpu._handlers()
        return tpu

    def close(self):
        self._channel.close()
        self._server.stop(None).wait()


@contextlib.contextmanager
def served():
    server = Server()
    try:
        yield server
    finally:
        server.close()
