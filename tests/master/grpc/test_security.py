"""Who may call: a shared token, TLS, certificates of clients."""

import ssl
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.master.grpc.harness import DEADLINE, RunningMaster
from umbp_connectors.client.grpc_transport import GrpcTransport
from umbp_connectors.master.security import Security, TlsMaterial
from umbp_connectors.wire_grpc.channel import channel_credentials
from umbp_core.errors import AccessDenied, ConfigError, MasterUnavailable
from umbp_core.master.model import Registration

CERTIFICATES = Path(__file__).resolve().parents[1] / "certs"
DENIED = grpc.StatusCode.UNAUTHENTICATED


def pem(name: str) -> bytes:
    return (CERTIFICATES / name).read_bytes()


def tls(client_ca: bytes | None = None) -> Security:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    return Security(b"", TlsMaterial(pem("server.pem"), pem("server.key"), client_ca, context))


# --- Token.


def test_a_token_is_wanted_of_every_call() -> None:
    with RunningMaster(security=Security(b"s3cret", None)) as master:
        for stub in (
            master.stub(),
            master.stub(token="s3cre"),
            master.stub(token="s3cret "),
            master.stub(token="S3CRET"),
        ):
            code, details = stub.error("RegisterClient", node_id="n1")
            assert code is DENIED
            assert "token" in details
            assert "s3cret" not in details.lower()
            assert stub.error("MatchExternalKv", hashes=["a"])[0] is DENIED
        master.stub(token="s3cret")("RegisterClient", node_id="n1")
        denied = [code for _, call, code in master.observer.calls if call == "RegisterClient"]
        assert denied == ["UNAUTHENTICATED"] * 4 + ["OK"]


def test_two_tokens_are_none() -> None:
    with RunningMaster(security=Security(b"s3cret", None)) as master:
        stub = master.stub()
        twice = (("authorization", "Bearer s3cret"), ("authorization", "Bearer other"))
        with pytest.raises(grpc.RpcError) as caught:
            stub.raw("Heartbeat")(b"", timeout=DEADLINE, metadata=twice)
        assert caught.value.code() is DENIED


def test_health_needs_no_token_and_reflection_does() -> None:
    with RunningMaster(security=Security(b"s3cret", None)) as master, grpc.insecure_channel(master.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            ProtoReflectionDescriptorDatabase(channel).get_services()
        assert caught.value.code() is DENIED


def test_our_client_shows_its_token() -> None:
    with RunningMaster(security=Security(b"s3cret", None)) as master:
        with pytest.raises(AccessDenied, match="token"):
            master.transport().register(Registration("n1"), DEADLINE)
        assert master.transport(token="s3cret").register(Registration("n1"), DEADLINE).heartbeat_interval_ms == 5000


# --- TLS.


def test_tls() -> None:
    with RunningMaster(security=tls()) as master:
        trusted = grpc.secure_channel(master.target, grpc.ssl_channel_credentials(pem("ca.pem")))
        master.stub(trusted)("RegisterClient", node_id="n1")
        transport = master.transport(credentials=channel_credentials(pem("ca.pem")))
        assert transport.hit_counts([b"a"], DEADLINE) == []


def test_tls_at_one_end_only_does_not_connect() -> None:
    with RunningMaster(security=tls()) as master:
        for options in ({}, {"credentials": channel_credentials(pem("stranger.pem"))}):
            with pytest.raises(MasterUnavailable, match="TLS"):
                GrpcTransport.connect(master.target, 0.5, **options)
    with RunningMaster() as plain, pytest.raises(MasterUnavailable, match="TLS"):
        GrpcTransport.connect(plain.target, 0.5, credentials=channel_credentials(pem("ca.pem")))


def test_mtls_wants_a_certificate_of_its_authority() -> None:
    with RunningMaster(security=tls(pem("ca.pem"))) as master:
        ca = pem("ca.pem")
        good = channel_credentials(ca, pem("client.pem"), pem("client.key"))
        master.transport(credentials=good).register(Registration("n1"), DEADLINE)
        for bad in (channel_credentials(ca), channel_credentials(ca, pem("stranger.pem"), pem("stranger.key"))):
            transport = GrpcTransport(master.target, credentials=bad)
            with pytest.raises(MasterUnavailable):
                transport.register(Registration("n2"), 2.0)
            transport.close()


@pytest.mark.parametrize("half", [{"certificate": b"x"}, {"key": b"x"}])
def test_half_a_client_certificate_is_refused(half: dict[str, bytes]) -> None:
    with pytest.raises(ConfigError, match="both or neither"):
        channel_credentials(b"ca", **half)
