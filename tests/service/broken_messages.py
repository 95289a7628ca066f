"""Messages for attacks: valid ones of every method, what becomes of them when they are broken, and senseless ones."""

from google.protobuf import duration_pb2
from hypothesis import strategies as st

from ntm_serving.v1 import model_service_pb2 as model_pb
from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import tensor_pb2
from tests.service.support import random_inputs, step_request

SERVICE = "/ntm_serving.v1.SequenceService/"
MODELS = "/ntm_serving.v1.ModelService/"
SPEC = pb.ModelSpec(name="sums", version=1)
VICTIMS = ("f0", "f1")


def seeds(rng):
    """Valid messages of every method, to be broken."""
    step = step_request(rng.choice(VICTIMS), random_inputs(rng.randrange(1, 9)), rng.randrange(4), "r", 1.0)
    name = rng.choice([*VICTIMS, "x"])
    second = duration_pb2.Duration(seconds=5)
    return [
        (SERVICE + "Step", step),
        (SERVICE + "BatchStep", pb.BatchStepRequest(requests=[step] * 3)),
        (SERVICE + "StreamSteps", pb.StreamStepsRequest(requests=[step] * 3, cancel=["r"])),
        (SERVICE + "StreamSteps", pb.StreamStepsRequest(columns=[columns_of(step)] * 2, cancel=["r"])),
        (SERVICE + "CreateSession", pb.CreateSessionRequest(session_id=name, model=SPEC, ttl=second)),
        (SERVICE + "GetSession", pb.GetSessionRequest(session_id=name)),
        (SERVICE + "InspectSession", pb.InspectSessionRequest(session_id=name)),
        (SERVICE + "ListSessions", pb.ListSessionsRequest(page_size=3, page_token="x")),
        (SERVICE + "DeleteSession", pb.DeleteSessionRequest(session_id="x")),
        (SERVICE + "ForkSession", pb.ForkSessionRequest(session_id=name, fork_session_id="x", ttl=second)),
        (SERVICE + "SnapshotSession", pb.SnapshotSessionRequest(session_id=name)),
        (SERVICE + "RestoreSession", pb.RestoreSessionRequest(session_id="x", snapshot=rng.randbytes(90))),
        (MODELS + "GetModel", model_pb.GetModelRequest(name="sums")),
        (MODELS + "ListModels", model_pb.ListModelsRequest()),
    ]


def columns_of(step):
    """The same step twice, of two sessions, as columns."""
    columns = pb.StepColumns(request_ids=["r", "q"], session_ids=VICTIMS, positions=[step.position] * 2)
    columns.inputs.CopyFrom(step.inputs)
    columns.inputs.shape.insert(0, 2)
    columns.inputs.content *= 2
    columns.timeout.CopyFrom(step.timeout)
    return columns


def broken(rng, data):
    """``data`` with bits flipped, bytes cut, doubled, replaced by large varints, or none of it kept."""
    data = bytearray(data)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = data[: rng.randrange(len(data) + 1)]
            case 3:
                data[at : at + 2] = b"\xff" * rng.randrange(11)
            case 4:
                data[at : at + rng.randrange(20)] = rng.randbytes(rng.randrange(20))
    return bytes(data)


_int64 = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 5)
_int32 = st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 5)
_names = st.sampled_from([*VICTIMS, "x", "", "../x", "a\x00b"]) | st.text(max_size=70)
_durations = st.builds(
    duration_pb2.Duration, seconds=st.sampled_from([0, 1, -1, 2**62, -(2**62)]) | _int64, nanos=_int32
)
_tensors = st.builds(
    tensor_pb2.Tensor,
    dtype=_int32,
    shape=st.lists(_int64, max_size=4) | st.tuples(st.integers(0, 4), st.just(2)),
    content=st.binary(max_size=64) | st.sampled_from([bytes(8), b"\xff" * 8, b"\x00\x00\x80\x7f" * 2]),
)
_steps = st.builds(
    pb.StepRequest,
    request_id=_names,
    session_id=_names,
    position=st.none() | _int64,
    inputs=_tensors,
    timeout=st.none() | _durations,
)
_columns = st.builds(
    pb.StepColumns,
    request_ids=st.lists(_names, max_size=3),
    session_ids=st.lists(_names, max_size=3),
    positions=st.lists(_int64, max_size=3),
    inputs=_tensors,
    timeout=st.none() | _durations,
)
_models = st.builds(pb.ModelSpec, name=st.just("sums") | _names, version=st.none() | _int64)
_ttl = st.none() | _durations
SENSELESS = {
    SERVICE + "Step": _steps,
    SERVICE + "BatchStep": st.builds(pb.BatchStepRequest, requests=st.lists(_steps, max_size=4)),
    SERVICE + "StreamSteps": st.builds(
        pb.StreamStepsRequest,
        requests=st.lists(_steps, max_size=4),
        cancel=st.lists(_names, max_size=3),
        columns=st.lists(_columns, max_size=3),
    ),
    SERVICE + "CreateSession": st.builds(pb.CreateSessionRequest, session_id=_names, model=_models, ttl=_ttl),
    SERVICE + "ListSessions": st.builds(pb.ListSessionsRequest, page_size=_int32, page_token=_names),
    SERVICE + "ForkSession": st.builds(pb.ForkSessionRequest, session_id=_names, fork_session_id=_names, ttl=_ttl),
    SERVICE + "RestoreSession": st.builds(
        pb.RestoreSessionRequest, session_id=_names, snapshot=st.binary(max_size=90), ttl=_ttl
    ),
    MODELS + "GetModel": st.builds(model_pb.GetModelRequest, name=_names),
}
