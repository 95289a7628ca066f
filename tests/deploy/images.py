"""What the Dockerfile says of each image."""

import json
import re

from tests.deploy.rendered import REPOSITORY

TEXT = (REPOSITORY / "Dockerfile").read_text()


def instructions(text=TEXT):
    """``(INSTRUCTION, rest)`` of each, its continued lines joined, without comments."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def stages():
    """Instructions by stage, FROM first; what stands before the first stage is under ''."""
    found = {"": []}
    for name, rest in instructions():
        if name == "FROM":
            stage = rest.split()[-1]
            found[stage] = []
        else:
            stage = list(found)[-1]
        found[stage].append((name, rest))
    return found


def values(stage, name):
    return [rest for instruction, rest in stages()[stage] if instruction == name]


def inherited(stage, name):
    """The values of a stage and of those that it stands on, its own last."""
    below = values(stage, "FROM")[0].split()[0]
    return [*(inherited(below, name) if below in stages() else []), *values(stage, name)]


def entrypoint(image):
    """What an image of ours runs: ``ntm-serving/gateway:0.1.0`` is the stage ``gateway``."""
    stage = image.removeprefix("ntm-serving/").rpartition(":")[0] or image.removeprefix("ntm-serving/")
    return json.loads(values(stage, "ENTRYPOINT")[0])
