"""Work units on Vertex AI and on Kubernetes (GKE), by XManager's executors.

Both run a container of the job's image, whose entrypoint must run the arguments that it gets, with
this project as its working folder. In it, `launch.local` begins a job again that ends early; of a
machine that is lost, the platform makes another. One machine a work unit; slices of TPUs are rented
by `launch.gce`.
"""

# XManager is an extra, and not wherever this is checked.
# pyright: reportMissingImports=false, reportMissingModuleSource=false

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from clipa_t5x import topologies
from clipa_t5x.errors import UserError
from launch import job, sweep

# Stands for the experiment's number, which is the time of its submission.
_NUMBER = 0


@dataclasses.dataclass(frozen=True)
class _Accelerator:
    """One kind of GPU.

    Attributes:
      resource: XManager's name of it.
      gke: Google's, on nodes of a cluster.
      machines: types of Vertex AI's machines, by number of GPUs. XManager knows those of smaller
        GPUs only, and gives the others machines that cannot have them.
    """

    resource: str
    gke: str
    machines: dict[int, str]


_ACCELERATORS = {
    "gpu-a100": _Accelerator(
        "a100_80gib", "nvidia-a100-80gb", {n: f"a2-ultragpu-{n}g" for n in (1, 2, 4, 8)}
    ),
    "gpu-h100": _Accelerator(
        "h100", "nvidia-h100-80gb", {n: f"a3-highgpu-{n}g" for n in (1, 2, 4, 8)}
    ),
    "gpu-h200": _Accelerator("h200", "nvidia-h200-141gb", {8: "a3-ultragpu-8g"}),
}
_CPU_MACHINES = {n: f"n1-standard-{n}" for n in (1, 2, 4, 8, 16, 32, 64, 96)}
_MOST_GPUS = 8
_NAMESPACE = "default"
_MAX_RESTARTS = "--max_restarts="


def not_installed(error: ImportError) -> UserError:
    """Of a library of XManager's."""
    return UserError(f"launch.xm needs XManager ({error}): pip install 'clipa_t5x[xmanager]'.")


def arguments(spec: job.JobSpec) -> list[str]:
    """What a work unit's container runs."""
    return [
        *("python3", "-m", "launch.local", f"--name={spec.name}", f"--verb={spec.verb}"),
        *(f"--gin_file={path}" for path in spec.gin_file),
        f"--gin_search_paths={','.join(spec.gin_search_paths)}",
        *(f"--gin_bindings={binding}" for binding in spec.gin_bindings),
        f"--model_dir={spec.model_dir}",
        *(f"--arguments={argument}" for argument in spec.arguments),
        f"--topology={spec.topology}",
        f"{_MAX_RESTARTS}{spec.restarts.max_restarts}",
    ]


@dataclasses.dataclass(frozen=True)
class Cloud:
    """What Vertex AI and Kubernetes have in common.

    Attributes:
      project: of Google Cloud; None takes the credentials'.
      region: of Vertex AI.
      service_account: that work units run as; None takes the platform's.
    """

    project: str | None
    region: str
    service_account: str | None

    def check(self, spec: job.JobSpec) -> None:
        """Refuses what would be rented in vain.

        Raises:
          UserError: the job's field, and what it may be.
        """
        if spec.image is None:
            raise UserError("a work unit needs a container: give --image=IMAGE of this project.")
        if "://" not in spec.model_dir:
            raise UserError(
                f"model_dir is {spec.model_dir!r}, which would be lost with its container: give a "
                "bucket's address, gs://BUCKET/DIR."
            )
        policy = dataclasses.replace(job.RestartPolicy(), max_restarts=spec.restarts.max_restarts)
        if spec.restarts != policy:
            raise UserError("restarts of a work unit in a container have max_restarts alone.")
        topology = topologies.parse(spec.topology)
        if topology.kind.torus_dims or spec.num_slices > 1:
            raise UserError(
                f"topology is {spec.topology} ({spec.num_slices} slices): XManager's executors "
                "rent one machine of CPUs or GPUs; launch.gce rents slices of TPUs."
            )
        self._check_size(topology)

    def _check_size(self, topology: topologies.Topology) -> None:
        raise NotImplementedError

    def _executor(self, requirements: Any) -> Any:
        raise NotImplementedError

    def shown(self, units: Sequence[sweep.WorkUnit]) -> str:
        """What would be submitted, as YAML, in one document for each work unit."""
        raise NotImplementedError

    def argument(self, text: str) -> str:
        """An argument, or a variable's value, so that the platform hands it on as it is."""
        return text

    def make_job(self, spec: job.JobSpec) -> Any:
        """XManager's job of a work unit that `check` passed.

        Raises:
          UserError: XManager is not installed.
        """
        try:
            from xmanager import xm
            from xmanager.xm_local import executables
        except ImportError as error:
            raise not_installed(error) from error
        topology = topologies.parse(spec.topology)
        accelerator = _ACCELERATORS.get(topology.kind.name)
        requirements = xm.JobRequirements()
        # By its constructor, XManager 0.8.1 takes no accelerator: it asks one for what it lacks.
        requirements.accelerator = xm.GpuType[accelerator.resource] if accelerator else None
        resource = requirements.accelerator or xm.ResourceType.CPU
        requirements.task_requirements[resource] = topology.num_chips
        image = executables.GoogleContainerRegistryImage(
            name=spec.name, image_path=spec.image or ""
        )
        return xm.Job(
            image,
            self._executor(requirements),
            name=spec.name,
            # It quotes others for a shell, and there is none.
            args=[xm.ShellSafeArg(self.argument(text)) for text in arguments(spec)],
            env_vars={name: self.argument(value) for name, value in spec.environment.items()},
        )

    async def submit(self, name: str, units: Sequence[sweep.WorkUnit]) -> None:
        """Makes an experiment of the work units; waits for none of them.

        Raises:
          UserError: the platform refused it, and what it said.
        """
        from xmanager import xm_local

        jobs = [self.make_job(unit.spec) for unit in units]
        try:
            self._connect()
            async with xm_local.create_experiment(name) as experiment:
                for each in jobs:
                    await experiment.add(each)
        except _refusals() as error:
            raise UserError(
                f"{_fact(error)}: nothing more is submitted; see that credentials, quota and "
                "cluster are those that are meant."
            ) from error

    def _connect(self) -> None:
        """Prepares XManager's client."""
        raise NotImplementedError


def _refusals() -> tuple[type[Exception], ...]:
    from google.api_core import exceptions as api
    from google.auth import exceptions as auth
    from kubernetes import client, config

    return (api.GoogleAPICallError, auth.GoogleAuthError, client.ApiException,
            config.ConfigException)  # fmt: skip


def _fact(error: Exception) -> str:
    """What was said, in one line."""
    text = str(error)
    with contextlib.suppress(TypeError, ValueError, KeyError):  # Kubernetes answers in JSON.
        text = json.loads(getattr(error, "body", None) or "")["message"]
    return " ".join(text.split()).rstrip(".")[:400]


class Vertex(Cloud):
    """Custom jobs of Vertex AI."""

    def _check_size(self, topology: topologies.Topology) -> None:
        accelerator = _ACCELERATORS.get(topology.kind.name)
        machines = accelerator.machines if accelerator else _CPU_MACHINES
        if topology.num_chips not in machines:
            sizes = ", ".join(f"{topology.kind.name}-{n}" for n in machines)
            raise UserError(f"topology is {topology.name}: Vertex AI has machines of {sizes}.")

    def _executor(self, requirements: Any) -> Any:
        from xmanager import xm_local

        return xm_local.Vertex(requirements=requirements)

    def _connect(self) -> None:
        from google.cloud import aiplatform_v1  # pyright: ignore[reportAttributeAccessIssue]
        from xmanager.cloud import vertex

        cloud = self

        class Client(vertex.Client):
            """Launches what `shown` shows."""

            def launch(self, name: str, jobs: Sequence[Any]) -> str:
                endpoint = {"api_endpoint": f"{self.location}-aiplatform.googleapis.com"}
                service = aiplatform_v1.JobServiceClient(client_options=endpoint)
                [each] = jobs
                return service.create_custom_job(
                    parent=self.parent, custom_job=cloud.custom_job(name, each)
                ).name

        vertex.set_default_client(Client(self.project, self.region))

    def custom_job(self, name: str, made: Any) -> Any:
        """The request for a job of `make_job`, an `aiplatform_v1.CustomJob`."""
        from google.cloud import aiplatform_v1 as v1  # pyright: ignore[reportAttributeAccessIssue]
        from xmanager import xm
        from xmanager.cloud import vertex

        [(resource, count)] = made.executor.requirements.task_requirements.items()
        if resource in xm.GpuType:
            accelerator = _accelerator(resource)
            machine = v1.MachineSpec(
                machine_type=accelerator.machines[int(count)],
                accelerator_type=vertex.aip_v1_gpu_accelerator_type_str(resource),
                accelerator_count=int(count),
            )
        else:
            machine = v1.MachineSpec(machine_type=_CPU_MACHINES[int(count)])
        container = v1.ContainerSpec(
            image_uri=made.executable.image_path,
            args=made.args.to_list(),
            env=[v1.EnvVar(name=name, value=value) for name, value in made.env_vars.items()],
        )
        pool = v1.WorkerPoolSpec(machine_spec=machine, container_spec=container, replica_count=1)
        spec = v1.CustomJobSpec(
            worker_pool_specs=[pool],
            service_account=self.service_account or "",
            # The whole job: a machine that is lost is replaced.
            scheduling=v1.Scheduling(restart_job_on_worker_restart=True),
        )
        return v1.CustomJob(display_name=name, job_spec=spec)

    def shown(self, units: Sequence[sweep.WorkUnit]) -> str:
        """What would be submitted, as YAML, in one document for each work unit."""
        from google.protobuf import json_format

        documents = []
        for number, unit in enumerate(units, 1):
            title = f"{unit.spec.name}_{_NUMBER}_{number}"
            request = self.custom_job(title, self.make_job(unit.spec))
            documents.append((unit.name, json_format.MessageToDict(type(request).pb(request))))
        return _as_yaml(documents)


class Kubernetes(Cloud):
    """Jobs of a Kubernetes cluster; GPUs by GKE's names of them."""

    def _check_size(self, topology: topologies.Topology) -> None:
        if topology.kind.name != "cpu" and topology.num_chips > _MOST_GPUS:
            raise UserError(
                f"topology is {topology.name}: no machine has more than {_MOST_GPUS} GPUs."
            )

    def argument(self, text: str) -> str:
        """Escapes variables: Kubernetes puts their values for $(NAME), and $ for $$."""
        return text.replace("$", "$$")

    def _executor(self, requirements: Any) -> Any:
        from xmanager import xm_local

        return xm_local.Kubernetes(requirements=requirements)

    def _connect(self) -> None:
        from kubernetes import client, config
        from xmanager.cloud import kubernetes
        from xmanager.xm_local import executors, registry

        try:
            config.load_incluster_config()
        except config.ConfigException:  # This is no pod of the cluster.
            config.load_kube_config()

        async def launch(unit: Any, job_group: Any) -> list[Any]:
            [each] = job_group.jobs.values()
            made = self.kubernetes_job(unit.get_full_job_name(each.name), each)
            client.BatchV1Api().create_namespaced_job(_NAMESPACE, made)
            return [kubernetes.KubernetesHandle(jobs=[made])]

        registry.register(executors.Kubernetes, launch=launch)

    def kubernetes_job(self, name: str, made: Any) -> Any:
        """The request for a job of `make_job`, a `V1Job`.

        XManager's own cannot be made by today's client of Kubernetes once there are variables, and
        knows no nodes of newer GPUs.
        """
        from kubernetes import client as k8s
        from xmanager import xm

        [(resource, count)] = made.executor.requirements.task_requirements.items()
        is_gpu = resource in xm.GpuType
        container = k8s.V1Container(
            name=_label(name),
            image=made.executable.image_path,
            args=made.args.to_list(),
            env=[k8s.V1EnvVar(name=name, value=value) for name, value in made.env_vars.items()],
            resources=k8s.V1ResourceRequirements(
                limits={"nvidia.com/gpu" if is_gpu else "cpu": str(int(count))}
            ),
        )
        pod = k8s.V1PodSpec(
            containers=[container],
            restart_policy="Never",
            service_account_name=self.service_account,
            node_selector={"cloud.google.com/gke-accelerator": _accelerator(resource).gke}
            if is_gpu
            else None,
        )
        # What launch.local gives up is given up; a pod that is lost is made again.
        given_up = k8s.V1PodFailurePolicyRule(
            action="FailJob",
            on_exit_codes=k8s.V1PodFailurePolicyOnExitCodesRequirement(
                operator="In", values=[1, 2]
            ),
        )
        [restarts] = [a for a in made.args.to_list() if a.startswith(_MAX_RESTARTS)]
        return k8s.V1Job(
            api_version="batch/v1",
            kind="Job",
            metadata=k8s.V1ObjectMeta(name=_label(name), namespace=_NAMESPACE),
            spec=k8s.V1JobSpec(
                template=k8s.V1PodTemplateSpec(spec=pod),
                backoff_limit=int(restarts.removeprefix(_MAX_RESTARTS)),
                pod_failure_policy=k8s.V1PodFailurePolicy(rules=[given_up]),
            ),
        )

    def shown(self, units: Sequence[sweep.WorkUnit]) -> str:
        """What would be submitted, as YAML, in one document for each work unit."""
        from kubernetes import client

        api = client.ApiClient()
        documents = []
        for number, unit in enumerate(units, 1):
            name = f"{_NUMBER}_{number}_{unit.spec.name}"
            request = self.kubernetes_job(name, self.make_job(unit.spec))
            documents.append((unit.name, api.sanitize_for_serialization(request)))
        return _as_yaml(documents)


def _label(name: str) -> str:
    """Kubernetes allows no underscores."""
    return name.replace("_", "-")


def _accelerator(resource: Any) -> _Accelerator:
    return next(a for a in _ACCELERATORS.values() if a.resource == resource.name.lower())


def _as_yaml(documents: Iterable[tuple[str, Any]]) -> str:
    return "".join(
        f"---\n# work unit {name}; for {_NUMBER} its name has the time of the submission.\n"
        + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
        for name, content in documents
    )


EXECUTORS: dict[str, type[Cloud]] = {"vertex": Vertex, "kubernetes": Kubernetes}


def executor(arguments: argparse.Namespace) -> Cloud:
    """The one that flags ask for.

    Raises:
      UserError: Vertex AI without a project.
    """
    if arguments.executor == "vertex" and not arguments.project:
        raise UserError("--executor=vertex needs --project=PROJECT, of Google Cloud.")
    return EXECUTORS[arguments.executor](
        arguments.project, arguments.region, arguments.service_account
    )
