"""What is wrong is answered by a status with a sentence, and nothing of it is applied."""

from typing import Any

import grpc
import pytest

from tests.master.grpc.harness import DEADLINE, HBM, RunningMaster, Stub, matches, message, methods

INTERNAL = grpc.StatusCode.INTERNAL
CALLS = [method.name for method in methods()]
LATIN = b"caf\xe9"


def status(call: Stub, name: str, data: bytes) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call.raw(name)(data, timeout=DEADLINE)
    return caught.value.code(), caught.value.details()


@pytest.mark.parametrize("name", CALLS)
def test_bytes_that_are_no_message_are_internal_as_grpc_has_it(call: Stub, name: str) -> None:
    for data in (b"\x0a\x05ab", b"\xff" * 11, b"\x07", b"\x0b\x0a\x01a"):
        code, details = status(call, name, data)
        assert code is INTERNAL
        assert details


@pytest.mark.parametrize("name", ["ReportExternalKvBlocks", "RevokeExternalKvBlocks", "MatchExternalKv"])
@pytest.mark.parametrize("others", [0, 20_000])
def test_observed_hashes_that_are_not_utf8_are_internal(call: Stub, name: str, others: int) -> None:
    call("RegisterClient", node_id="n1")
    many = [f"h{number}" for number in range(others)]
    fields: dict[str, Any] = {"hashes": [*many, "caf"]}
    if name != "MatchExternalKv":
        fields |= {"node_id": "n1", "tier": HBM}
    method = next(method for method in methods() if method.name == name)
    good = message(method.input_type.name)(**fields).SerializeToString()
    code, details = status(call, name, good.replace(b"\x03caf", b"\x04" + LATIN))
    assert code is INTERNAL
    assert "not UTF-8" in details
    assert matches(call("MatchExternalKv", hashes=["h1", "caf"])) == {}


@pytest.mark.parametrize("name", ["RoutePut", "RouteGet", "BatchRoutePut", "BatchRouteGet", "BatchLookup"])
def test_keys_that_are_not_utf8_are_internal(call: Stub, name: str) -> None:
    method = next(method for method in methods() if method.name == name)
    fields = {"key": "caf"} if name in ("RoutePut", "RouteGet") else {"keys": ["caf"]}
    if name == "BatchRoutePut":
        fields["block_sizes"] = [1]  # type: ignore[list-item]
    good = message(method.input_type.name)(**fields).SerializeToString()
    code, details = status(call, name, good.replace(b"\x03caf", b"\x04" + LATIN))
    assert code is INTERNAL
    assert "not UTF-8" in details


def test_event_keys_that_are_not_utf8_are_internal(call: Stub) -> None:
    call("RegisterClient", node_id="n1")
    event = b"\x12\x04" + LATIN
    data = b"\x0a\x02n1" + b"\x12\x0a\x08\x01\x12\x06" + event
    code, details = status(call, "Heartbeat", data)
    assert code is INTERNAL
    assert "not UTF-8" in details
    assert call("Heartbeat", node_id="n1").acked_seq == 0


def test_other_strings_that_are_not_utf8_are_internal(call: Stub) -> None:
    assert status(call, "RegisterClient", b"\x0a\x04" + LATIN)[0] is INTERNAL
    assert status(call, "ReportMetrics", b"\x0a\x04" + LATIN)[0] is INTERNAL


def test_hashes_in_other_scripts_are_hashes(call: Stub) -> None:
    call("RegisterClient", node_id="n1")
    hashes = ["été", "块", "\x00", "🧱" * 100]
    call("ReportExternalKvBlocks", node_id="n1", hashes=hashes, tier=HBM)
    assert matches(call("MatchExternalKv", hashes=hashes)) == {"n1": {HBM: hashes}}


def test_calls_that_do_not_exist_are_unimplemented(call: Stub) -> None:
    assert status(call, "ApplyExternalKvBatch", b"")[0] is grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.RpcError) as caught:
        call.channel.unary_unary("/umbp.UMBPPeer/EvictKey")(b"", timeout=DEADLINE)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_metrics_want_a_node(call: Stub) -> None:
    code, details = call.error("ReportMetrics", node_id="")
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "node_id" in details


def test_every_call_is_observed_with_its_code_and_time(master: RunningMaster) -> None:
    call = master.stub()
    call("RegisterClient", node_id="n1")
    call.error("RegisterClient", node_id="n1")
    status(call, "MatchExternalKv", b"\xff")
    wanted = [
        ("grpc", "RegisterClient", "OK"),
        ("grpc", "RegisterClient", "ALREADY_EXISTS"),
        ("grpc", "MatchExternalKv", "INTERNAL"),
    ]
    with master.observer.finished:
        assert master.observer.finished.wait_for(lambda: len(master.observer.calls) == len(wanted), DEADLINE)
    assert master.observer.calls == wanted
    assert all(0 <= seconds < DEADLINE for seconds in master.observer.seconds)


def test_what_our_own_code_gets_wrong_is_unknown_to_the_caller_and_counted(
    master: RunningMaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(master.service, "unregister", broken)
    call = master.stub()
    assert call.error("UnregisterClient", node_id="n1")[0] is grpc.StatusCode.UNKNOWN
    assert master.observer.calls == [("grpc", "UnregisterClient", "UNKNOWN")]
    assert call("Heartbeat", node_id="n1").status == 0
