"""The official client against the service's own messages, on this machine."""

import dataclasses

import grpc
import pytest
from saved_runs import one_line_error

from clipa_t5x import topologies
from launch.controller import Node, RefusedError, ServiceError

pytest.importorskip("google.cloud.tpu_v2", reason="google-cloud-tpu is not installed")

from fake_tpu import FakeTpu, Fate, NodeState, TurnedClock  # noqa: E402
from google.api_core import exceptions  # noqa: E402
from google.auth.exceptions import RefreshError  # noqa: E402

from launch import cloud_tpu  # noqa: E402

PLACE = cloud_tpu.Place("p", "us-east5-b", "my-run")
MACHINES = cloud_tpu.Machines("v5litepod-16", "v2-alpha-tpuv5-lite", tier="spot")
CODE = grpc.StatusCode


@pytest.fixture
def tpu(server):
    tpu = server.serve(FakeTpu(TurnedClock()))
    yield tpu
    assert not tpu.mistakes


@pytest.fixture
def cloud(server, tpu):
    def make(place=PLACE, machines=MACHINES):
        said = []
        cloud = cloud_tpu.CloudTpu(
            server.client, place, machines=machines, clock=tpu.clock, say=said.append
        )
        return cloud, said

    return make


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v4-256", ("v4-512", "tpu-ubuntu2204-base")),
        ("v5e-256", ("v5litepod-256", "v2-alpha-tpuv5-lite")),
        ("v5p-64", ("v5p-128", "v2-alpha-tpuv5")),
        ("v6e-256", ("v6e-256", "v2-alpha-tpuv6e")),
    ],
)
def test_topologies_by_the_services_names(name, expected):
    assert cloud_tpu.accelerator(topologies.parse(name)) == expected


@pytest.mark.parametrize("name", ["cpu-8", "gpu-h100-8", "tpu7x-8"])
def test_what_is_no_cloud_tpu_is_refused(name):
    one_line_error(lambda: cloud_tpu.accelerator(topologies.parse(name)), name, "v5e, v5p")


def test_the_request():
    machines = dataclasses.replace(
        MACHINES, service_account="me@p.iam", subnetwork="s", internal_ips=True, ssh_keys="me:key"
    )
    request = cloud_tpu.creation(PLACE, machines, 3, 7200.4)
    spec = request.queued_resource.tpu.node_spec[0]
    assert (request.parent, request.queued_resource_id) == (
        "projects/p/locations/us-east5-b", "my-run",
    )  # fmt: skip
    assert "spot" in request.queued_resource and not spec.node.network_config.enable_external_ips
    assert (spec.node_id, spec.node.accelerator_type) == ("my-run", "v5litepod-16")
    assert dict(spec.node.labels) == {
        "clipa_t5x-job": "my-run",
        "clipa_t5x-restarts": "3",
        "clipa_t5x-chip-seconds": "7200",
    }
    assert spec.node.metadata["ssh-keys"] == "me:key"
    assert spec.node.service_account.email == "me@p.iam"
    machines = dataclasses.replace(MACHINES, num_slices=2, tier="reserved", reservation="mine")
    request = cloud_tpu.creation(PLACE, machines, 0)
    spec = request.queued_resource.tpu.node_spec[0]
    assert (spec.multislice_params.node_count, spec.multislice_params.node_id_prefix) == (
        2, "my-run",
    )  # fmt: skip
    assert not spec.node_id and "spot" not in request.queued_resource
    assert request.queued_resource.reservation_name == f"{PLACE.parent}/reservations/mine"


def test_machines_from_request_to_deletion(cloud, tpu):
    cloud, said = cloud(machines=dataclasses.replace(MACHINES, num_slices=2))
    tpu.fates.append(Fate(waits=100, provisions=50, preempted=1000, deletes=40, orphans=True))
    assert cloud.find() is None and cloud.delete()
    cloud.create(4)
    found = cloud.find()
    assert (found.state, found.restarts, found.nodes) == ("WAITING_FOR_RESOURCES", 4, ())
    tpu.clock.sleep(100)
    assert cloud.find().state == "PROVISIONING"
    tpu.clock.sleep(50)
    found = cloud.find()
    assert found.state == "ACTIVE" and found.nodes == tuple(
        Node(f"my-run-{i}", "READY", (f"34.0.{i}.0", f"34.0.{i}.1")) for i in range(2)
    )
    assert cloud.host_keys("my-run-0") == ("ssh-ed25519 AAAA0", "ssh-ed25519 AAAA1")
    tpu.host_keys = False
    assert cloud.host_keys("my-run-0") == ()
    tpu.clock.sleep(900)
    hours, chip_hours = cloud.chip_hours()
    assert abs(hours - 0.25) < 1e-3 and abs(chip_hours - 8) < 0.05  # Of 2 x 16 chips.
    tpu.clock.sleep(100)
    found = cloud.find()
    assert found.state == "SUSPENDED" and not found.by_user
    assert not cloud.delete() and not cloud.delete() and tpu.left
    tpu.clock.sleep(40)
    assert cloud.delete() and not tpu.left
    assert tpu.calls["delete_queued_resource"] == 1 and not said


def test_nodes_that_outlive_their_request_are_deleted_and_others_are_not(cloud, tpu):
    mine, _ = cloud()
    other, _ = cloud(dataclasses.replace(PLACE, name="other"))
    tpu.fates.append(Fate(orphans=True))
    mine.create(0)
    other.create(0)
    mine.find()
    assert not mine.delete()
    assert mine.find() is None and len(tpu.left) == 3
    assert not mine.delete() and not mine.delete()
    tpu.clock.sleep(30)
    assert mine.delete() and len(tpu.left) == 2 and other.find().state == "ACTIVE"


@pytest.mark.parametrize("how", ["PREEMPTED", "TERMINATED", "gone"])
def test_nodes_that_are_lost_while_the_request_is_active(cloud, tpu, how):
    cloud, _ = cloud()
    tpu.fates.append(Fate(preempted=10, how=how))
    cloud.create(0)
    assert cloud.find().nodes[0].state == "READY"
    tpu.clock.sleep(10)
    found = cloud.find()
    assert found.state == "ACTIVE"
    assert found.nodes[0].state == ("MISSING" if how == "gone" else how)


@pytest.mark.parametrize("when", ["ask", "answer"])
def test_passing_troubles_are_passed_over_and_nothing_is_done_twice(cloud, tpu, when):
    cloud, said = cloud()
    codes = [CODE.UNAVAILABLE, CODE.INTERNAL, CODE.DEADLINE_EXCEEDED, CODE.UNKNOWN, CODE.ABORTED]
    troubles = iter([])
    tpu.troubles = lambda method: next(troubles, None)
    for action in (lambda: cloud.create(0), cloud.find, cloud.delete, cloud.delete):
        troubles = iter([(code, when) for code in codes])
        action()
        assert next(troubles, None) is None
    assert tpu.most_live == 1 and not tpu.left and len(tpu.seen) == 1
    assert len(said) >= 19 and said[0].endswith("it was done: once more in 5 s.")


def test_a_service_that_stays_away_is_told_of(cloud, tpu):
    cloud, _ = cloud()
    tpu.troubles = lambda method: (CODE.UNAVAILABLE, "ask")
    with pytest.raises(ServiceError, match="has not answered for .* launch.gce status"):
        cloud.find()
    assert 1800 < tpu.clock.now() < 2000


REFUSALS = [
    (CODE.RESOURCE_EXHAUSTED, "Quota limit 'TPUV5sPreemptibleLitepod' has been exceeded.", "quota"),
    (CODE.PERMISSION_DENIED, "Permission 'tpu.nodes.create' denied.", "roles/tpu.admin"),
    (CODE.INVALID_ARGUMENT, "Accelerator v5litepod-16 is not found.", "accelerator-types list"),
    (CODE.FAILED_PRECONDITION, "No such network.", "accelerator-types list"),
]


@pytest.mark.parametrize(("code", "text", "remedy"), REFUSALS)
@pytest.mark.parametrize("field", ["refusal", "operation_error"])
def test_refusals_are_the_services_words_and_what_to_do(cloud, tpu, code, text, remedy, field):
    cloud, _ = cloud()
    tpu.fates.append(Fate(**{field: (code, text)}))
    with pytest.raises(RefusedError) as caught:
        cloud.create(0)
    assert not tpu.left and "\n" not in str(caught.value)
    assert caught.value.is_quota == (code is CODE.RESOURCE_EXHAUSTED)
    for part in ("1 x v5litepod-16", "us-east5-b", code.name, text[:-1], remedy):
        assert part in str(caught.value)


def test_an_unknown_zone(cloud, tpu):
    cloud, _ = cloud(dataclasses.replace(PLACE, zone="us-east9-z"))
    assert cloud.find() is None and cloud.delete()
    one_line_error(lambda: cloud.create(0), "NOT_FOUND", "us-east9-z is not found", "gcloud")
    for zone in ("us-east5-b/nodes", "", "A"):
        one_line_error(lambda z=zone: dataclasses.replace(PLACE, zone=z), "--zone", repr(zone))


def test_so_many_requests_a_minute_is_no_quota_of_machines(cloud, tpu):
    cloud, _ = cloud()
    troubles = iter([(CODE.RESOURCE_EXHAUSTED, "ask")])
    tpu.troubles = lambda method: next(troubles, None)
    assert cloud.find() is None


def test_failures_tell_whether_they_may_pass(cloud, tpu):
    for code, can_retry in ((CODE.INTERNAL, True), (CODE.INVALID_ARGUMENT, False)):
        one, _ = cloud(dataclasses.replace(PLACE, name=f"run-{code.name[:3].lower()}"))
        tpu.fates.append(Fate(failure=(code, "This is why.")))
        one.create(0)
        found = one.find()
        assert (found.state, found.detail, found.can_retry) == ("FAILED", "This is why", can_retry)


def test_what_is_of_somebody_else_is_left_alone(cloud, tpu):
    cloud, _ = cloud()
    cloud.create(0)
    (queued,) = tpu.queued.values()
    queued.message.tpu.node_spec[0].node.labels.clear()
    for action in (cloud.find, cloud.delete):
        one_line_error(action, "queuedResources/my-run", "choose another --name")
    assert tpu.calls["delete_queued_resource"] == 0


def test_other_machines_under_the_jobs_name(cloud, tpu):
    first, _ = cloud()
    first.create(0)
    other, _ = cloud(machines=dataclasses.replace(MACHINES, num_slices=2))
    one_line_error(other.find, "has 1 x v5litepod-16", "2 x v5litepod-16", "launch.gce delete")


def test_missing_credentials(monkeypatch, tmp_path, cloud, server):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    one_line_error(cloud_tpu.connect, "no credentials", "none.json", "application-default login")
    cloud, _ = cloud()
    plugin = "Getting metadata from plugin failed with error: Reauthentication is needed."
    for error in (RefreshError("Token has been expired."), exceptions.ServiceUnavailable(plugin)):

        def fail(error=error, **_):
            raise error

        monkeypatch.setattr(server.client, "get_queued_resource", fail)
        one_line_error(cloud.find, "no credentials", "application-default login")


def test_states_are_those_that_the_controller_knows():
    from launch import controller

    known = {*controller._WAITING, "ACTIVE", "DELETING", "SUSPENDING", "SUSPENDED", "FAILED"}
    assert known == set(cloud_tpu.tpu_v2.QueuedResourceState.State.__members__)
    assert set(controller._LOST_NODES) - {"MISSING"} <= set(NodeState.__members__)
