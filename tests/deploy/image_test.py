"""The Dockerfile's rules, and the gateway image's content: what its stage installs, put together and started.

No container engine runs here. `make images` executes the Dockerfile itself, on a bootstrapped Debian
(docs/deployment.md). This test takes the list of what the gateway's stage installs out of the Dockerfile, fills an
empty environment with just that out of the one that the tests run in, and runs the stage's own scripts on it.
"""

import fnmatch
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from service.client import SequenceClient
from tests.deploy import images
from tests.deploy.rendered import REPOSITORY
from tests.integration.processes import Gateway
from tests.service.executors.sequence_models import WIDTH, export_sums
from tests.service.gateway_process import resident_bytes
from tests.service.model_server.processes import running_model_server

FINAL = ("gateway", "gateway-embedded", "model-server", "trainer")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (REPOSITORY / "constraints.txt").read_text()
EVERY = pytest.mark.parametrize("stage", FINAL)

# What an image has below its packages: `make images` measures 123 MB of Debian and its interpreter.
IMAGE_MB, BASE_AND_INTERPRETER_MB = 250, 123
RESIDENT_MB = 150


def test_the_base_is_pinned_and_everything_stands_on_it():
    (base,) = [rest for name, rest in images.stages()[""] if name == "ARG"]
    assert re.fullmatch(r"BASE=docker\.io/library/debian:bookworm-\d{8}-slim@sha256:[0-9a-f]{64}", base)
    known = {"${BASE}"}
    for stage, found in images.stages().items():
        if stage:
            assert found[0][1].split()[0] in known, found[0]
            known.add(stage)


@EVERY
def test_an_image_runs_as_nobody_and_has_nothing_that_builds(stage):
    found = images.stages()
    assert found[stage][0] == ("FROM", f"image AS {stage}")
    assert found["image"][0] == ("FROM", "python AS image")
    assert not images.values(stage, "RUN"), "nothing is installed in the image itself"
    assert not images.values("image", "RUN")
    (user,) = images.inherited(stage, "USER")
    assert re.fullmatch(r"[1-9]\d{4,}:[1-9]\d{4,}", user)
    labels = re.findall(r"org\.opencontainers\.image\.(\w+)=", " ".join(images.inherited(stage, "LABEL")))
    assert sorted(labels) == sorted({"title", "description", "version", "revision", "source", "licenses"})
    assert f"VERSION={PROJECT['version']}" in images.inherited(stage, "ARG")


@EVERY
def test_what_a_new_revision_changes_comes_last(stage):
    """So that a change of the sources makes one small layer anew, and the packages keep theirs."""
    assert images.values(stage, "COPY") == [f"--from={stage}-packages /opt/ntm /opt/ntm", "--from=project /project/ /"]
    assert images.stages()[stage][-2:] == [
        ("ARG", "REVISION=unknown"),
        ("LABEL", 'org.opencontainers.image.revision="${REVISION}"'),
    ]
    sources = {word for stage in images.stages() for rest in images.values(stage, "COPY") for word in rest.split()[:-1]}
    assert {"ntm", "service", "training", "protos"} <= sources
    built = images.stages()[f"{stage}-packages"]
    assert built[0] == ("FROM", f"build AS {stage}-packages")
    assert not {"ntm", "service", "training", "protos"} & {word for _, rest in built for word in rest.split()}
    assert images.values("build", "COPY") == ["pyproject.toml constraints.txt LICENSE ./"]


@EVERY
def test_every_package_of_an_image_is_pinned(stage):
    """CUDA's too, which no environment of ours has."""
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in CONSTRAINTS.splitlines() if "==" in line}
    assert needed(*installed_by(stage)) <= pinned


@EVERY
def test_an_image_starts_what_there_is_and_says_how_it_is(stage):
    program, *arguments = images.entrypoint(f"ntm-serving/{stage}")
    assert program in PROJECT["scripts"] or [program, *arguments] == ["python", "-m", "training.train"]
    (health,) = images.values(stage, "HEALTHCHECK")
    if stage == "trainer":
        assert health == "NONE"
        return
    command = json.loads(health.partition("CMD ")[2])
    assert command[:3] == ["python", "-m", "service.health"]
    said = " ".join(images.values(stage, "ENV") + images.values(stage, "CMD"))
    assert command[3] in said, "it asks where the image listens"


def test_the_context_is_small_and_has_all_that_is_copied():
    context = list(in_context())
    assert sum(path.stat().st_size for path in context) < 2_000_000
    names = {path.relative_to(REPOSITORY).as_posix() for path in context}
    for stage in images.stages():
        for rest in images.values(stage, "COPY"):
            if not rest.startswith("--from="):
                for source in rest.split()[:-1]:
                    assert any(name == source or name.startswith(f"{source}/") for name in names), source
    assert not [name for name in names if name.startswith(("tests/", ".git/", "docs/", "deploy/"))]


def in_context():
    """The files that .dockerignore leaves: it starts from nothing and names what comes back."""
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    out = [rule.removeprefix("**/") for rule in rules[1:] if not rule.startswith("!")]
    for rule in rules[1:]:
        top = REPOSITORY / rule.removeprefix("!")
        if rule.startswith("!"):
            for path in [top, *top.rglob("*")]:
                if path.is_file() and not any(fnmatch.fnmatch(part, o) for part in path.parts for o in out):
                    yield path


def installed_by(stage):
    """``(requirements, requirements without what they need)`` of the stage's RUN lines."""
    text = " ".join(images.values(f"{stage}-packages", "RUN"))
    for argument in images.values(f"{stage}-packages", "ARG"):
        name, _, default = argument.partition("=")
        text = text.replace(f"${name}", default)
    extras = re.search(r"['\"]\.\[([\w,-]+)\]['\"]", text)[1].split(",")
    alone = re.findall(r"--no-deps ([a-z][\w-]+)", text)
    wanted = [*PROJECT["dependencies"]]
    while extras:
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extras.pop()]):
            if requirement.name == PROJECT["name"]:
                extras += requirement.extras
            else:
                wanted.append(str(requirement))
    return wanted, alone


def needed(wanted, alone):
    """Names of all that an installer would bring; packages that are not here (CUDA's) are taken to need no others."""
    seen, left = set(), [Requirement(text) for text in wanted]
    while left:
        requirement = left.pop()
        if (requirement.name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((requirement.name, frozenset(requirement.extras)))
        left += [inner for inner in needs(requirement.name) if applies(inner, requirement.extras)]
    return {name.lower().replace("_", "-") for name, _ in seen} | set(alone)


def needs(name):
    try:
        return [Requirement(text) for text in importlib.metadata.requires(name) or ()]
    except importlib.metadata.PackageNotFoundError:
        return []


def applies(requirement, extras):
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def put(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with what the gateway's stage installs, and nothing else."""
    folder = tmp_path_factory.mktemp("image")
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    subprocess.run([base, "-m", "venv", "--without-pip", folder / "ntm"], check=True)
    (packages,) = (folder / "ntm").glob("lib/python3*/site-packages")
    for distribution in map(importlib.metadata.distribution, needed(*installed_by("gateway"))):
        for file in distribution.files:
            if not file.is_absolute() and ".." not in file.parts:
                put(Path(distribution.locate_file(file)), packages / file)
    run("slim.py", folder / "ntm")
    # The wheel that the Dockerfile downloads, with what the script has to find in it and what it has to leave.
    tensorflow = importlib.metadata.distribution("tensorflow")
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels" / f"tensorflow-{tensorflow.version}-any.whl", "w") as wheel:
        for file in tensorflow.files:
            if file.name.endswith("_pb2.py") or file.as_posix() in ("tensorflow/__init__.py", "tensorflow/core/ops.py"):
                wheel.write(tensorflow.locate_file(file), file.as_posix())
    run("carry_serving_protos.py", folder / "wheels", packages)
    for root, name in ((REPOSITORY, "service"), (REPOSITORY / "protos", "ntm_serving")):
        for path in (root / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                put(path, packages / path.relative_to(root))
    return folder / "ntm", packages


def run(script, *arguments):
    subprocess.run([sys.executable, REPOSITORY / "scripts" / script, *arguments], check=True, capture_output=True)


def test_of_tensorflow_there_are_messages_alone(environment):
    files = [path for path in (environment[1] / "tensorflow").rglob("*") if path.is_file()]
    assert len(files) > 50
    assert all(path.name.endswith("_pb2.py") for path in files)
    assert not list(environment[1].glob("pip*"))


def test_the_image_s_content_is_small(environment):
    size = sum(path.stat().st_size for path in environment[1].rglob("*") if path.is_file())
    print(f"packages of the gateway image: {size / 1e6:.0f} MB")
    assert size / 1e6 < IMAGE_MB - BASE_AND_INTERPRETER_MB


def test_the_gateway_starts_from_it_and_serves_over_a_model_server(environment, tmp_path):
    export_sums(tmp_path / "models", scale=3.0)
    command = (str(environment[0] / "bin" / "python"), "-I", "-m", "service")
    inputs = np.arange(4 * WIDTH, dtype=np.float32).reshape(4, WIDTH)
    with running_model_server(tmp_path / "models", tmp_path / "server") as server:
        serving = ("--tf-serving", server.address, "--model", "sums")
        with Gateway(tmp_path, *serving, program=command) as gateway, SequenceClient(gateway.target) as client:
            sessions = [client.create_session("sums") for _ in range(64)]
            for outputs in client.step_many([(session, inputs) for session in sessions]):
                np.testing.assert_allclose(outputs, 3 * np.cumsum(inputs, axis=0))
            resident = resident_bytes(gateway.process.pid) / 1e6
            print(f"resident: {resident:.0f} MB")
            assert resident < RESIDENT_MB
            mapped = Path(f"/proc/{gateway.process.pid}/maps").read_text()
            assert str(environment[1]) in mapped
            assert "libtensorflow" not in mapped
            tests_own = str(importlib.metadata.distribution("grpcio").locate_file("grpc"))
            assert tests_own not in mapped, "it runs on its own packages, not on the tests'"
            assert gateway.terminate() == 0
