"""What only the blocking client has: threads, futures, ``with``, and processes that fork."""

import concurrent.futures
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref

import grpc
import numpy as np
import pytest

from service.client import GatewayError, PrecedingStepFailed, RetryPolicy, SequenceClient, SessionNotFound
from tests.service.support import random_inputs, run_whole


@pytest.fixture
def client(gateway):
    with SequenceClient(gateway.target, timeout=20) as client:
        yield client


def test_with_opens_and_deletes(gateway):
    with SequenceClient(gateway.target) as client:
        with client.session("sums") as session:
            outputs = session.step(random_inputs(3), timeout=5)
        assert outputs.shape == (3, 3)
        with pytest.raises(SessionNotFound):
            client.attach(session.session_id)


def test_with_on_an_attached_session_leaves_it_be(client):
    session = client.create_session("sums")
    with client.attach(session.session_id) as attached:
        attached.step(random_inputs(1))
    assert client.attach(session.session_id).position == 1


def test_leaving_with_an_exception_tells_of_that_exception(start_gateway):
    gateway = start_gateway()
    with SequenceClient(gateway.target, retry=RetryPolicy(initial=0.01)) as client:
        session = client.session("sums", session_id="mine")
        trouble = ZeroDivisionError()
        gateway.kill()
        session.__exit__(ZeroDivisionError, trouble, None)
    assert "session 'mine' was not deleted and will expire" in trouble.__notes__[0]


def test_threads_share_a_client_and_each_session_keeps_its_order(client):
    inputs = [random_inputs(20, seed=n) for n in range(16)]
    outputs = {}

    def work(n):
        with client.session("sums") as session:
            outputs[n] = np.concatenate([session.step(inputs[n][k : k + 1]) for k in range(20)])

    workers = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for n, x in enumerate(inputs):
        np.testing.assert_array_equal(outputs[n], run_whole(x)[0])


def test_threads_that_share_a_session_take_turns(client):
    session = client.session("sums")
    ones = np.ones((1, 2), np.float32)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        counts = sorted(int(y[0, 2]) for y in pool.map(lambda _: session.step(ones), range(40)))
    assert counts == list(range(1, 41))


def test_a_callback_may_step_again(client):
    session = client.session("sums")
    second = concurrent.futures.Future()

    def go_on(first):
        session.step_async(random_inputs(1)).add_done_callback(lambda done: second.set_result(done.result()))

    session.step_async(random_inputs(1)).add_done_callback(go_on)
    assert second.result(20)[0, 2] == 2


def test_a_pipeline_of_futures_never_applies_a_step_in_a_failed_ones_place(client, gateway):
    session = client.session("sums")
    bad, behind = session.step_async(np.zeros((1, 9))), session.step_async(random_inputs(1))
    concurrent.futures.wait([bad, behind], 20)
    unaware = session.step_async(random_inputs(1))  # nobody has looked at `bad` or `behind` yet
    with pytest.raises(PrecedingStepFailed):
        unaware.result(20)
    assert isinstance(behind.exception(20), PrecedingStepFailed)
    assert session.step_async(random_inputs(1)).result(20)[0, 2] == 1
    assert gateway.position(session) == 1


@pytest.mark.parametrize("look", ["result", "exception"])
def test_a_session_goes_on_once_its_failure_was_looked_at(client, look):
    session = client.session("sums")
    bad = session.step_async(np.zeros((1, 9)))
    concurrent.futures.wait([bad], 20)
    if look == "result":
        with pytest.raises(GatewayError, match="INVALID_TENSOR"):
            bad.result()
    else:
        assert bad.exception().reason == "INVALID_TENSOR"
    assert session.step_async(random_inputs(1)).result(20).shape == (1, 3)


def test_a_future_can_be_cancelled_and_its_step_repeated(client, gateway):
    session = client.session("sums")
    gateway.hold()
    future = session.step_async(random_inputs(2))
    gateway.eventually(lambda: gateway.executor.batches)
    assert future.cancel()
    assert future.cancelled()
    gateway.release()
    np.testing.assert_array_equal(session.step(random_inputs(2)), run_whole(random_inputs(2))[0])
    assert gateway.position(session) == 2
    done = session.step_async(random_inputs(1))
    done.result(20)
    assert not done.cancel()


def test_waiting_for_a_future_ends_without_ending_the_step(client, gateway):
    session = client.session("sums")
    gateway.hold()
    future = session.step_async(random_inputs(2))
    with pytest.raises(TimeoutError):
        future.result(0.01)
    gateway.release()
    assert future.result(20).shape == (2, 3)


@pytest.fixture
def interruptible():
    """Python's own handler, also where the tests run in the background of a shell, which has SIGINT ignored there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_step_is_given_up_and_can_be_repeated(client, gateway):
    session = client.session("sums")
    gateway.hold()
    given_up = threading.Event()

    def interrupt():
        gateway.eventually(lambda: gateway.executor.batches)
        os.kill(os.getpid(), signal.SIGINT)
        # A signal that comes in the moment before the thread begins to wait does not end the wait: Python's own.
        while not given_up.wait(5):
            os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        session.step(random_inputs(2))
    given_up.set()
    interrupter.join()
    gateway.release()
    np.testing.assert_array_equal(session.step(random_inputs(2)), run_whole(random_inputs(2))[0])


def test_a_client_that_nobody_holds_closes_itself(gateway):
    client = SequenceClient(gateway.target)
    session = client.session("sums")
    session.step(random_inputs(1))
    connection = weakref.ref(session._connection)
    del client
    gc.collect()
    assert session.step(random_inputs(1)).shape == (1, 3)  # a session holds its connection
    del session
    gc.collect()
    assert connection() is None


def test_inputs_may_be_written_over_as_soon_as_the_step_is_asked_for(client, gateway):
    session = client.session("sums")
    buffer = random_inputs(2)
    gateway.hold()
    future = session.step_async(buffer)
    buffer[:] = 0
    gateway.release()
    np.testing.assert_array_equal(future.result(20), run_whole(random_inputs(2))[0])


FORKED = """
import os, sys
import grpc
from service.client import SequenceClient

client = SequenceClient("127.0.0.1:1", timeout=0.2)
session = client.attach("a", position=0)
child = os.fork()
if not child:
    said = 0
    for call in (lambda: session.step([[1.0]]), lambda: session.step_async([[1.0]]), session.info, session.close):
        try:
            call()
        except RuntimeError as error:
            said += "fork" in str(error)
    client.close()
    sys.exit(4 - said)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_client_that_was_forked_says_so():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


NEEDS = """
import sys
import service.client
heavy = {"tensorflow", "keras", "pydantic", "structlog", "uvloop", "rich", "service.engine", "service.server"}
sys.exit(",".join(heavy & sys.modules.keys()) or None)
"""


def test_the_client_needs_little():
    done = subprocess.run([sys.executable, "-c", NEEDS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_process_that_forgets_to_close_its_client_still_ends(gateway):
    program = (
        "import sys; from service.client import SequenceClient\n"
        "session = SequenceClient(sys.argv[1]).session('sums'); print(session.step([[1.0, 2.0]]).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, gateway.target], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "(1, 3)\n"), done.stderr


def test_errors_are_grpc_errors(client):
    with pytest.raises(grpc.RpcError) as caught:
        client.session("nobody")
    assert isinstance(caught.value, GatewayError)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
