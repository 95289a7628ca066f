"""Tokens, certificates, and what one principal can see of another: nothing."""

import hashlib

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ntm_serving.v1 import model_service_pb2 as model_pb
from ntm_serving.v1 import model_service_pb2_grpc, sequence_service_pb2_grpc
from ntm_serving.v1 import sequence_service_pb2 as pb
from service.auth import TokenFile
from service.config import SettingsError
from service.errors import Unauthenticated
from tests.service.refusals import refused
from tests.service.support import NumpyExecutor, random_inputs, running_gateway, step_request, version_of


def sha256(token):
    return hashlib.sha256(token.encode()).hexdigest()


TOKENS = f"""
[alice]
tokens_sha256 = ["{sha256("alice-1")}", "{sha256("alice-2")}"]

[bob]
tokens_sha256 = ["{sha256("bob-1")}"]
models = ["sums"]
max_sessions = 2
max_queued_steps = 1
"""


@pytest.fixture
def token_file(tmp_path):
    path = tmp_path / "tokens.toml"
    path.write_text(TOKENS)
    return path


def bearer(token):
    return (("authorization", f"Bearer {token}"),)


ALICE, BOB = bearer("alice-1"), bearer("bob-1")


def create(name, model="sums"):
    return pb.CreateSessionRequest(session_id=name, model=pb.ModelSpec(name=model))


@pytest.mark.parametrize(
    "metadata", [(), bearer("wrong"), bearer(""), bearer(sha256("alice-1")), (("authorization", "alice-1"),)]
)
async def test_without_a_valid_token_nothing_is_answered_but_health(token_file, metadata):
    async with running_gateway(token_file=token_file) as running:
        calls = [
            running.stub.CreateSession(create("s"), metadata=metadata),
            running.stub.GetSession(pb.GetSessionRequest(session_id="s"), metadata=metadata),
            running.stub.Step(step_request("s", random_inputs(1), 0), metadata=metadata),
            running.models.ListModels(model_pb.ListModelsRequest(), metadata=metadata),
            running.stub.StreamSteps(metadata=metadata).read(),
        ]
        for call in calls:
            code, reason, _ = await refused(call)
            assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        health = health_pb2_grpc.HealthStub(running.channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


async def test_a_session_belongs_to_who_opened_it_and_nobody_else_can_tell_that_it_is_there(token_file):
    async with running_gateway(token_file=token_file) as running:
        stub = running.stub
        await stub.CreateSession(create("hers"), metadata=ALICE)
        assert (
            await stub.GetSession(pb.GetSessionRequest(session_id="hers"), metadata=bearer("alice-2"))
        ).position == 0
        calls = {
            "GetSession": pb.GetSessionRequest,
            "InspectSession": pb.InspectSessionRequest,
            "SnapshotSession": pb.SnapshotSessionRequest,
        }
        for method, request in calls.items():
            code, reason, status = await refused(getattr(stub, method)(request(session_id="hers"), metadata=BOB))
            assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
            _, _, unknown = await refused(getattr(stub, method)(request(session_id="none"), metadata=BOB))
            assert str(status).replace("hers", "none") == str(unknown)
        code, _, _ = await refused(stub.Step(step_request("hers", random_inputs(1), 0), metadata=BOB))
        assert code == grpc.StatusCode.NOT_FOUND
        assert not (await stub.ListSessions(pb.ListSessionsRequest(), metadata=BOB)).sessions
        await stub.DeleteSession(pb.DeleteSessionRequest(session_id="hers"), metadata=BOB)
        await stub.CreateSession(create("hers"), metadata=BOB)  # the id is free for him
        await stub.Step(step_request("hers", random_inputs(1), 0), metadata=ALICE)
        assert (await stub.GetSession(pb.GetSessionRequest(session_id="hers"), metadata=BOB)).position == 0


async def test_a_page_token_is_bound_to_its_caller(token_file):
    async with running_gateway(token_file=token_file) as running:
        for name in "ab":
            await running.stub.CreateSession(create(name), metadata=ALICE)
        page = await running.stub.ListSessions(pb.ListSessionsRequest(page_size=1), metadata=ALICE)
        stolen = pb.ListSessionsRequest(page_token=page.next_page_token)
        code, _, _ = await refused(running.stub.ListSessions(stolen, metadata=BOB))
        assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_principal_s_models_are_all_that_it_sees(token_file):
    async with running_gateway(NumpyExecutor(version_of(), version_of("other")), token_file=token_file) as running:

        async def seen(metadata):
            return [
                m.name
                for m in (await running.models.ListModels(model_pb.ListModelsRequest(), metadata=metadata)).models
            ]

        assert await seen(ALICE) == ["other", "sums"]
        assert await seen(BOB) == ["sums"]
        for call in (
            running.models.GetModel(model_pb.GetModelRequest(name="other"), metadata=BOB),
            running.stub.CreateSession(create("s", "other"), metadata=BOB),
        ):
            code, reason, _ = await refused(call)
            assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_a_model_that_is_taken_from_a_principal_opens_nothing_new_and_what_is_open_goes_on(token_file):
    token_file.write_text(TOKENS.replace('models = ["sums"]', 'models = ["sums", "other"]'))
    async with running_gateway(NumpyExecutor(version_of(), version_of("other")), token_file=token_file) as running:
        await running.stub.CreateSession(create("s", "other"), metadata=BOB)
        token_file.write_text(TOKENS)
        running.gateway._authenticator.reload()
        fork = pb.ForkSessionRequest(session_id="s", fork_session_id="t")
        code, reason, _ = await refused(running.stub.ForkSession(fork, metadata=BOB))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
        assert (await running.stub.Step(step_request("s", random_inputs(1), 0), metadata=BOB)).position == 1


async def test_a_principal_s_limits_are_its_own(token_file):
    async with running_gateway(token_file=token_file) as running:
        for name in "ab":
            await running.stub.CreateSession(create(name), metadata=BOB)
        await running.stub.CreateSession(create("a"), metadata=BOB)  # sent again: it is there
        code, reason, _ = await refused(running.stub.CreateSession(create("c"), metadata=BOB))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SESSION_LIMIT")
        await running.stub.CreateSession(create("c"), metadata=ALICE)
        running.executor.hold()
        call = running.stub.StreamSteps(metadata=BOB)
        await call.write(pb.StreamStepsRequest(requests=[step_request(n, random_inputs(1), 0, n) for n in "ab"]))
        (response,) = (await call.read()).responses
        assert response.status.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        running.executor.gate.set()
        assert (await running.stub.Step(step_request("c", random_inputs(1), 0), metadata=ALICE)).position == 1


async def test_a_token_that_is_taken_out_of_the_file_ends_even_on_an_open_stream(token_file):
    async with running_gateway(token_file=token_file) as running:
        for name in "ab":
            await running.stub.CreateSession(create(name), metadata=ALICE)
        call = running.stub.StreamSteps(metadata=ALICE)
        await call.write(pb.StreamStepsRequest(requests=[step_request("a", random_inputs(1), 0)]))
        (response,) = (await call.read()).responses
        assert response.position == 1
        token_file.write_text(TOKENS.replace(sha256("alice-1"), sha256("alice-3")))
        running.gateway._authenticator.reload()
        await call.write(pb.StreamStepsRequest(requests=[step_request("a", random_inputs(1), 1)]))
        (response,) = (await call.read()).responses
        assert response.status.code == grpc.StatusCode.UNAUTHENTICATED.value[0]
        call.cancel()
        assert (
            await running.stub.GetSession(pb.GetSessionRequest(session_id="a"), metadata=bearer("alice-3"))
        ).position == 1


def test_a_token_file_that_breaks_leaves_what_was_there(token_file, caplog):
    tokens = TokenFile(token_file)
    token_file.write_text("this is not TOML")
    tokens.reload()
    assert tokens.caller("Bearer alice-1", None)().name == "alice"
    assert "not reloaded" in caplog.text
    token_file.unlink()
    tokens.reload()
    assert tokens.caller("bearer alice-1", None)().name == "alice"
    token_file.write_text(TOKENS.replace("alice", "carol"))
    tokens.reload()
    assert tokens.caller("Bearer alice-1", None)().name == "carol"
    with pytest.raises(Unauthenticated):
        tokens.caller("Bearer nope", None)()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[a]\ntokens_sha256 = ['short']", "64 hexadecimal"),
        ("[a]\ntoken = 'plain'", "['token']"),
        ("[a]\nmodels = []", "tokens_sha256"),
        (f"[a]\ntokens_sha256 = ['{sha256('x')}']\nmax_sessions = -1", "max_sessions"),
        (f"[a]\ntokens_sha256 = ['{sha256('x')}']\nmodels = 'copy'", "models"),
        (f"[a]\ntokens_sha256 = ['{sha256('x')}']\n[b]\ntokens_sha256 = ['{sha256('x')}']", "share a token"),
        ("a = 1", "table"),
    ],
)
def test_a_token_file_is_checked_at_start(tmp_path, text, says):
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match="token-file") as caught:
        TokenFile(path)
    assert says in str(caught.value)


class Pki:
    """A certificate authority, a server's files, and a client's."""

    def __init__(self, folder):
        self.ca, self.folder = trustme.CA(), folder
        self.key, self.cert, self.ca_file = (folder / name for name in ("tls.key", "tls.crt", "ca.crt"))
        self.ca_file.write_bytes(self.ca.cert_pem.bytes())
        self.issue(self.ca)

    def issue(self, ca):
        leaf = ca.issue_cert("localhost", "127.0.0.1")
        for path, content in (
            (self.key, leaf.private_key_pem.bytes()),
            (self.cert, b"".join(pem.bytes() for pem in leaf.cert_chain_pems)),
        ):
            partial = path.with_suffix(".partial")
            partial.write_bytes(content)
            partial.replace(path)

    def client(self, ca=None, name=None):
        if name is None:
            return grpc.ssl_channel_credentials((ca or self.ca).cert_pem.bytes())
        leaf = self.ca.issue_cert("client.test", common_name=name)
        chain = b"".join(pem.bytes() for pem in leaf.cert_chain_pems)
        return grpc.ssl_channel_credentials(self.ca.cert_pem.bytes(), leaf.private_key_pem.bytes(), chain)


@pytest.fixture
def pki(tmp_path):
    return Pki(tmp_path)


async def serving(target, credentials):
    """Whether a health check over a fresh connection is answered."""
    # A subchannel pool of its own: no connection of an earlier channel is used again.
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.ssl_target_name_override", "localhost")]
    async with grpc.aio.secure_channel(target, credentials, options) as channel:
        call = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        code = await call.code()
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
        return code == grpc.StatusCode.OK


async def test_tls_and_certificates_that_are_renewed_on_disk(pki):
    async with running_gateway(tls_key=pki.key, tls_cert=pki.cert) as running:
        assert await serving(running.target, pki.client())
        another = trustme.CA()
        assert not await serving(running.target, pki.client(another))
        pki.issue(another)
        assert await serving(running.target, pki.client(another))
        pki.key.write_bytes(b"half a fi")
        pki.issue(another)
        assert await serving(running.target, pki.client(another))


async def test_mtls_makes_the_certificate_s_name_the_principal(pki):
    settings = {"tls_key": pki.key, "tls_cert": pki.cert, "tls_client_ca": pki.ca_file}
    async with running_gateway(**settings) as running:
        assert not await serving(running.target, pki.client())

        def channel(name):
            options = [("grpc.ssl_target_name_override", "localhost")]
            return grpc.aio.secure_channel(running.target, pki.client(name=name), options)

        async with channel("alice") as alice, channel("bob") as bob:
            stub = sequence_service_pb2_grpc.SequenceServiceStub(alice)
            await stub.CreateSession(create("s"))
            assert (await stub.Step(step_request("s", random_inputs(2), 0))).position == 2
            its = sequence_service_pb2_grpc.SequenceServiceStub(bob)
            code, reason, _ = await refused(its.GetSession(pb.GetSessionRequest(session_id="s")))
            assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")
            await model_service_pb2_grpc.ModelServiceStub(bob).ListModels(model_pb.ListModelsRequest())
