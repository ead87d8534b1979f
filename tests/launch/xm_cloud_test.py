"""What is submitted to Vertex AI and to Kubernetes, and what is refused before."""

import dataclasses
import http.server
import json
import threading

import pytest
import yaml
from saved_runs import one_line_error

from launch import job, local, results, sweep, xm, xm_cloud

HOSTILE = "NAME = 'a b$(id)\"$HOME`x`'"
SPEC = job.JobSpec(
    ("gin/digits_stage1.gin",),
    "gs://bucket/runs",
    gin_bindings=(HOSTILE,),
    arguments=("--peer_timeout_seconds=20",),
    topology="gpu-h100-8",
    package=None,
    image="region-docker.pkg.dev/p/r/clipa:1",
    environment={"WHO": "it's $(HOME)"},
    restarts=job.RestartPolicy(max_restarts=7),
)
VERTEX = xm_cloud.Vertex("project", "europe-west4", "a@project.iam.gserviceaccount.com")
KUBERNETES = xm_cloud.Kubernetes(None, "", "trainer")


def units(**changes):
    spec = dataclasses.replace(SPEC, **changes)
    return sweep.work_units(spec, ["LEARNING_RATE=[1e-3, 2e-3]"])


@pytest.fixture
def library():
    pytest.importorskip("xmanager", reason="xmanager is not installed: extra xmanager")


def test_a_container_is_told_the_whole_job():
    """Its launcher reads from its arguments what the job is; its variables it has already."""
    program, *flags = xm_cloud.arguments(SPEC)[2:]
    assert program == "launch.local"
    read, _ = job.parse_arguments(local.parser(), flags)
    assert read == dataclasses.replace(SPEC, package=".", image=None, environment={})


@pytest.mark.parametrize("cloud", [VERTEX, KUBERNETES])
@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"image": None, "package": "."}, "give --image"),
        ({"model_dir": "runs/x"}, "gs://BUCKET/DIR"),
        ({"topology": "v5e-4"}, "launch.gce"),
        ({"num_slices": 2}, "launch.gce"),
        ({"topology": "gpu-a100-16"}, "gpu-a100-16"),
        ({"restarts": job.RestartPolicy(first_delay=1.0)}, "max_restarts alone"),
    ],
)
def test_what_would_be_rented_in_vain_is_refused(cloud, changes, part):
    cloud.check(SPEC)
    one_line_error(lambda: cloud.check(dataclasses.replace(SPEC, **changes)), part)


def test_vertex_has_no_machine_of_half_the_gpus_of_an_h200():
    spec = dataclasses.replace(SPEC, topology="gpu-h200-4")
    one_line_error(lambda: VERTEX.check(spec), "gpu-h200-8")
    KUBERNETES.check(spec)


def test_a_custom_job_of_vertex(library):
    first, second = yaml.safe_load_all(VERTEX.shown(units()))
    spec = first["jobSpec"]
    assert spec["serviceAccount"] == "a@project.iam.gserviceaccount.com"
    [pool] = spec["workerPoolSpecs"]
    assert pool["replicaCount"] == "1"
    assert pool["machineSpec"] == {
        "machineType": "a3-highgpu-8g",
        "acceleratorType": "NVIDIA_H100_80GB",
        "acceleratorCount": 8,
    }
    container = pool["containerSpec"]
    assert container["imageUri"] == SPEC.image
    assert f"--gin_bindings={HOSTILE}" in container["args"]
    assert "--model_dir=gs://bucket/runs/LEARNING_RATE=1e-3" in container["args"]
    assert container["env"] == [{"name": "WHO", "value": "it's $(HOME)"}]
    [pool] = second["jobSpec"]["workerPoolSpecs"]
    assert "--gin_bindings=LEARNING_RATE = 2e-3" in pool["containerSpec"]["args"]
    [pool] = next(yaml.safe_load_all(VERTEX.shown(units(topology="cpu-8"))))["jobSpec"][
        "workerPoolSpecs"
    ]
    assert pool["machineSpec"] == {"machineType": "n1-standard-8"}


def test_a_job_of_kubernetes(library):
    first, _ = yaml.safe_load_all(KUBERNETES.shown(units()))
    assert first["metadata"] == {"name": "0-1-clipa", "namespace": "default"}
    assert first["spec"]["backoffLimit"] == 7
    [rule] = first["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [1, 2]
    pod = first["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["serviceAccountName"] == "trainer"
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    [container] = pod["containers"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": "8"}}
    # As Kubernetes reads them, they are what they were.
    assert f"--gin_bindings={HOSTILE}" in [a.replace("$$", "$") for a in container["args"]]
    assert all("$" not in each.replace("$$", "") for each in container["args"])
    assert container["env"] == [{"name": "WHO", "value": "it's $$(HOME)"}]


class Cluster(http.server.ThreadingHTTPServer):
    """A Kubernetes API that keeps the jobs it gets, or refuses them."""

    def __init__(self, status=201):
        self.status, self.jobs = status, []
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/apis/batch/v1/namespaces/default/jobs"
        if self.server.status == 201:
            self.server.jobs.append(body)
        else:
            body = {"kind": "Status", "message": "exceeded quota: gpus"}
        answer = json.dumps(body).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.fixture
def submit(library, monkeypatch, pytestconfig, tmp_path):
    """Submits a sweep to a cluster by the command line; returns the status and the jobs."""
    monkeypatch.chdir(pytestconfig.rootpath)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def run(status=201):
        cluster = Cluster(status)
        threading.Thread(target=cluster.serve_forever, daemon=True).start()
        where = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{cluster.server_port}"}}
        context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "x", "clusters": [where],
            "contexts": [context], "users": [{"name": "u", "user": {}}],
        }  # fmt: skip
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        monkeypatch.setattr(
            "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION",
            str(tmp_path / "kubeconfig"),
        )
        try:
            return _main(tmp_path), cluster.jobs
        finally:
            cluster.shutdown()
            cluster.server_close()

    return run


def _main(tmp_path, *more):
    return xm.main(
        [
            "--gin_file=gin/digits_stage1.gin", "--model_dir=gs://bucket/runs", "--image=image",
            "--topology=gpu-a100-1", f"--experiment_dir={tmp_path / 'experiment'}",
            "--sweep=LEARNING_RATE=[1e-3, 2e-3]", "--executor=kubernetes", *more,
        ]
    )  # fmt: skip


def test_a_cluster_gets_what_the_dry_run_shows(submit, tmp_path, capsys):
    assert _main(tmp_path, "--dry_run") == 0
    shown = list(yaml.safe_load_all(capsys.readouterr().out))
    assert not (tmp_path / "experiment").exists()
    status, got = submit()
    assert status == 0 and len(got) == 2

    def without_names(each):
        names = {"metadata": None}
        each["spec"]["template"]["spec"]["containers"][0].update(name=None)
        return {**each, **names}

    assert [*map(without_names, got)] == [*map(without_names, shown)]
    record = results.Record.read(tmp_path / "experiment")
    assert [unit.name for unit in record.units] == ["LEARNING_RATE=1e-3", "LEARNING_RATE=2e-3"]
    assert (tmp_path / "experiment/experiments.sqlite3").exists()
    assert not (tmp_path / "home").exists()


def test_what_a_cluster_refuses_is_told_in_one_line(submit, capsys):
    assert submit(403) == (2, [])
    [line] = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert "exceeded quota: gpus" in line
