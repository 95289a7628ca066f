import os
import subprocess
import sys

import pytest

# Tells what gRPC would read, at the moment at which it is first imported; nothing is imported then.
WATCH = """
import importlib.abc, os, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_EXPERIMENTS"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Watch())
"""
GATEWAY = "from service.__main__ import command; command()"
CLIENT = "from service.ntm_client import main; main()"
MODEL_SERVER = "from service.model_server.__main__ import main; main(['--model-dir', '.'])"


def seen_by_grpc(program, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    done = subprocess.run(
        [sys.executable, "-c", WATCH + program],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "program", [GATEWAY, MODEL_SERVER, CLIENT], ids=["gateway", "model server", "command line client"]
)
def test_the_commands_settle_how_grpc_polls_before_it_is_imported(program):
    assert seen_by_grpc(program) == "-event_engine_listener,-event_engine_client"


def test_what_the_environment_says_stays():
    assert seen_by_grpc(GATEWAY, GRPC_EXPERIMENTS="") == ""
    assert seen_by_grpc(GATEWAY, GRPC_EXPERIMENTS="event_engine_listener") == "event_engine_listener"


def test_a_client_leaves_its_process_as_it_is():
    assert seen_by_grpc("import service.client") == "None"
