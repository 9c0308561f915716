"""``umbp master`` as a process: it says when it is ready, answers at both doors, and starts and stops as promised."""

import contextlib
import json
import resource
import signal
import socket
import ssl
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from tests.master.app.master_process import (
    CALL,
    DEADLINE,
    POSITIONAL,
    UMBP,
    MasterProcess,
    umbp,
)
from umbp_connectors import cli_master
from umbp_connectors.client.grpc_transport import GrpcTransport
from umbp_connectors.client.native_blocking import NativeBlockingClient
from umbp_connectors.client.native_session import Identity
from umbp_connectors.wire_grpc.channel import channel_credentials
from umbp_core.errors import AccessDenied, MasterError, MasterUnavailable
from umbp_core.master.model import Registration
from umbp_core.tiers import Tier

CERTS = Path(__file__).resolve().parents[1] / "certs"
TLS = ("--tls-cert", str(CERTS / "server.pem"), "--tls-key", str(CERTS / "server.key"))


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def free_pair() -> int:
    """A port that is free, like the one after it."""
    for _ in range(100):
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            try:
                with socket.create_server(("127.0.0.1", port + 1)):
                    return int(port)
            except OSError:
                continue
    raise AssertionError("no two free ports beside each other")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_both_doors_answer_and_a_signal_ends_it_gracefully(tmp_path: Path, number: signal.Signals) -> None:
    with MasterProcess(tmp_path) as master:
        assert set(master.doors) == {"grpc", "native", "metrics", "nodes"}
        assert master.doors["nodes"] == "0"
        native, grpc = master.native(), master.grpc()
        native.register(Registration("n1", peer_address="10.0.0.1:17000"), CALL)
        assert native.report("n1", [b"a", b"b"], Tier.HBM, CALL)
        (match,) = grpc.match([b"b", b"x"], False, CALL)
        assert (match.node_id, match.peer_address, match.tiers) == ("n1", "10.0.0.1:17000", {1: [b"b"]})
        assert master.get("/healthz") == (200, "alive\n")
        assert master.get("/readyz") == (200, "ready\n")
        assert "mori_umbp_client_count 1.0" in master.get("/metrics")[1]
        begin = monotonic()
        assert master.end(number) == 0
        assert monotonic() - begin < 15
        assert f"{number.name}: the master stops" in master.log
        assert "Traceback" not in master.log
        with pytest.raises(MasterUnavailable):
            native.match([b"b"], False, 1.0)
        native.close()
        grpc.close()


def test_a_stop_waits_for_clients_no_longer_than_its_deadline(tmp_path: Path) -> None:
    with MasterProcess(tmp_path, UMBP_GRPC_SHUTDOWN_DEADLINE_SEC="0.2") as master:
        host, _, port = master.doors["native"].rpartition(":")
        with socket.create_connection((host, int(port)), CALL) as idle:
            idle.sendall(b"UMB")
            begin = monotonic()
            assert master.end() == 0
            assert monotonic() - begin < 15


@pytest.mark.parametrize("hidden", ["", "import sys; sys.modules['uvloop'] = None; "], ids=["uvloop", "asyncio"])
def test_who_takes_all_descriptors_is_waited_out_at_every_door(tmp_path: Path, hidden: str) -> None:
    with MasterProcess(tmp_path, code=hidden + UMBP) as master:
        pid, folder = master.process.pid, Path(f"/proc/{master.process.pid}/fd")
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        most = len(list(folder.iterdir())) + 2
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, hard))
        with contextlib.ExitStack() as greedy:
            for door in ("native", "metrics", "grpc"):
                host, _, port = master.doors[door].rpartition(":")
                for _ in range(8):
                    greedy.enter_context(socket.create_connection((host, int(port)), CALL))
            end = monotonic() + DEADLINE
            while len(list(folder.iterdir())) < most:
                assert monotonic() < end
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
        native = master.native()
        assert native.match([b"a"], False, CALL) == []
        native.close()
        grpc = master.grpc()
        assert grpc.match([b"a"], False, CALL) == []
        grpc.close()
        assert master.get("/healthz") == (200, "alive\n")
        assert master.end() == 0


def test_unix_socket_is_for_its_owner_and_gone_after_the_end(tmp_path: Path) -> None:
    path = tmp_path / "m.sock"
    with MasterProcess(tmp_path, "--native-socket", str(path), "--listen=none", "--native-listen=none") as master:
        assert master.doors["socket"] == str(path)
        assert "grpc" not in master.doors
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        client = NativeBlockingClient(str(path))
        client.register(Registration("n1"), CALL)
        assert [info.node_id for info in client.list_nodes(CALL)] == ["n1"]
        client.close()
        assert master.end() == 0
    assert not path.exists()


@pytest.mark.parametrize("option", ["--listen", "--native-listen", "--metrics-listen"])
def test_a_busy_port_is_one_sentence_and_exit_code_2(tmp_path: Path, option: str) -> None:
    doors = {"--listen": "127.0.0.1:0", "--native-listen": "127.0.0.1:0", "--metrics-listen": "127.0.0.1:0"}
    with taken_port() as port:
        arguments = [f"{name}={value}" for name, value in (doors | {option: f"127.0.0.1:{port}"}).items()]
        done = umbp(tmp_path, "master", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        f"umbp: {option} 127.0.0.1:{port} is taken by another process, maybe another master; stop it or give another"
    ]


def test_a_second_master_on_the_same_port_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    with MasterProcess(tmp_path) as master:
        second = umbp(
            tmp_path, "master", "--listen", master.doors["grpc"], "--native-listen=none", "--metrics-listen=none"
        )
        assert second.returncode == 2
        assert second.stderr.startswith(f"umbp: --listen {master.doors['grpc']} is taken")
        assert len(second.stderr.splitlines()) == 1
        client = master.grpc()
        client.register(Registration("n1"), CALL)
        client.close()
        assert master.end() == 0


def test_a_second_master_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with MasterProcess(tmp_path, "--state-dir", "state") as master:
        second = umbp(
            tmp_path,
            "master",
            "--listen=127.0.0.1:0",
            "--native-listen=none",
            "--metrics-listen=none",
            "--state-dir=state",
        )
        assert second.returncode == 2
        assert len(second.stderr.splitlines()) == 1
        assert second.stderr.startswith(f"umbp: the state folder {tmp_path / 'state'} belongs to a master that runs;")
        assert master.end() == 0


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        (["--tls-cert", "x.pem"], {}, "TLS is half configured: tls_cert without tls_key"),
        (["--tls-client-ca", "x.pem"], {}, "TLS is half configured: tls_client_ca without tls_cert and tls_key"),
        (
            [],
            {"UMBP_HEARTBEAT_TTL_SEC": "soon"},
            "heartbeat_ttl_sec = 'soon' from environment UMBP_HEARTBEAT_TTL_SEC: ",
        ),
        ([], {"UMBP_HEARTBEAT_TTL_SECS": "1"}, "did you mean 'UMBP_HEARTBEAT_TTL_SEC'?"),
        (["--set", "heartbeat_ttl=1"], {}, "did you mean 'heartbeat_ttl_sec'?"),
        (["--listen", "nonsense"], {}, "an address is HOST:PORT"),
        (["--token-file", "missing"], {}, "missing cannot be read"),
        (["--listen", "256.0.0.1:1"], {}, "is no name of this machine"),
        (["--state-dir", "/dev/null/x"], {}, "name a folder that can be written by --state-dir"),
        (["--metadata-backend=redis", "--redis-uri=tcp://127.0.0.1:1"], {}, "cannot be kept in Redis at"),
        (["--metadata-backend=redis", "--redis-uri=http://x"], {}, "redis_uri http://x is none"),
    ],
)
def test_what_cannot_be_used_ends_the_start_with_a_sentence(
    tmp_path: Path, arguments: list[str], variables: dict[str, str], sentence: str
) -> None:
    doors = ["--native-listen=127.0.0.1:0", "--metrics-listen=none"]
    doors += [] if "--listen" in arguments else ["--listen=127.0.0.1:0"]
    done = umbp(tmp_path, "master", *doors, *arguments, **variables)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.startswith("umbp: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_setting_that_is_none_is_a_usage_error(tmp_path: Path) -> None:
    done = umbp(tmp_path, "master", "--set", "listen")
    assert done.returncode == 2
    assert "KEY=VALUE" in done.stderr


def test_configuration_is_shown_with_origins_and_without_secrets(tmp_path: Path) -> None:
    done = umbp(
        tmp_path,
        "master",
        "--listen=h:1",
        "--show-config",
        "--json",
        UMBP_MASTER_TOKEN="s3cret",
        UMBP_REAPER_INTERVAL_SEC="7",
    )
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert told["listen"] == {"value": "h:1", "origin": "command line"}
    assert told["reaper_interval_sec"] == {"value": 7.0, "origin": "environment UMBP_REAPER_INTERVAL_SEC"}
    assert told["token"] == {"value": "(secret)", "origin": "environment UMBP_MASTER_TOKEN"}
    plain = umbp(tmp_path, "master", "--show-config", UMBP_MASTER_TOKEN="s3cret")
    assert "s3cret" not in done.stdout + plain.stdout
    assert "UMBP_HEARTBEAT_TTL_SEC" in plain.stdout


def test_one_warning_when_others_may_reach_it_without_a_token(tmp_path: Path) -> None:
    everywhere = ("--listen=0.0.0.0:0", "--native-listen=0.0.0.0:0")
    with MasterProcess(tmp_path, *everywhere) as master:
        assert master.end() == 0
        assert master.log.count("may read and change everything") == 1
    with MasterProcess(tmp_path, *everywhere, UMBP_MASTER_TOKEN="s3cret") as master:
        assert master.end() == 0
        assert "may read and change everything" not in master.log


def test_token_is_asked_at_both_doors(tmp_path: Path) -> None:
    with MasterProcess(tmp_path, UMBP_MASTER_TOKEN="s3cret") as master:
        host, _, port = master.doors["native"].rpartition(":")
        good = NativeBlockingClient((host, int(port)), Identity(token=b"s3cret"))
        assert good.match([b"a"], False, CALL) == []
        good.close()
        bad = NativeBlockingClient((host, int(port)), Identity(token=b"other"))
        with pytest.raises(AccessDenied):
            bad.match([b"a"], False, CALL)
        bad.close()
        friend = GrpcTransport.connect(master.doors["grpc"], CALL, token="s3cret")
        assert friend.match([b"a"], False, CALL) == []
        friend.close()
        stranger = master.grpc()
        with pytest.raises(AccessDenied):
            stranger.match([b"a"], False, CALL)
        stranger.close()
        assert master.end() == 0


def test_mutual_tls_at_both_doors(tmp_path: Path) -> None:
    ca, certificate, key = CERTS / "ca.pem", CERTS / "client.pem", CERTS / "client.key"
    with MasterProcess(tmp_path, *TLS, "--tls-client-ca", str(ca)) as master:
        _, _, port = master.doors["native"].rpartition(":")
        context = ssl.create_default_context(cafile=ca)
        without = NativeBlockingClient(("127.0.0.1", int(port)), tls=context)
        with pytest.raises(MasterError):
            without.match([b"a"], False, CALL)
        without.close()
        context = ssl.create_default_context(cafile=ca)
        context.load_cert_chain(certificate, key)
        client = NativeBlockingClient(("127.0.0.1", int(port)), tls=context)
        assert client.match([b"a"], False, CALL) == []
        client.close()
        address = f"localhost:{master.doors['grpc'].rpartition(':')[2]}"
        mine = channel_credentials(ca.read_bytes(), certificate.read_bytes(), key.read_bytes())
        grpc = GrpcTransport.connect(address, CALL, credentials=mine)
        assert grpc.match([b"a"], False, CALL) == []
        grpc.close()
        with pytest.raises(MasterUnavailable):
            GrpcTransport.connect(address, 1.0, credentials=channel_credentials(ca.read_bytes()))
        assert master.end() == 0


def test_without_the_grpc_packages_the_native_protocol_is_served(tmp_path: Path) -> None:
    hidden = f"import sys; sys.modules['grpc'] = None; {UMBP}"
    with MasterProcess(tmp_path, code=hidden) as master:
        assert "grpc" not in master.doors
        assert master.says("gRPC is not served")
        assert master.says("umbp-connectors[grpc]")
        client = master.native()
        assert client.match([b"a"], False, CALL) == []
        client.close()
        assert master.end() == 0
    done = umbp(tmp_path, "master", "--native-listen=none", "--metrics-listen=none", code=hidden)
    assert done.returncode == 2
    assert "there is no door left to serve" in done.stderr


def test_without_uvloop_and_redis_it_runs_too(tmp_path: Path) -> None:
    hidden = f"import sys; sys.modules['uvloop'] = sys.modules['redis'] = None; {UMBP}"
    with MasterProcess(tmp_path, code=hidden) as master:
        client = master.native()
        assert client.match([b"a"], False, CALL) == []
        client.close()
        assert master.end() == 0
    done = umbp(
        tmp_path,
        "master",
        "--listen=127.0.0.1:0",
        "--native-listen=none",
        "--metrics-listen=none",
        "--metadata-backend=redis",
        code=hidden,
    )
    assert done.returncode == 2
    assert "umbp-connectors[redis]" in done.stderr


def test_original_form_listens_everywhere_and_on_the_port_after_it(tmp_path: Path) -> None:
    port = free_pair()
    with MasterProcess(tmp_path, f"localhost:{port}", "0", code=POSITIONAL, plain=True) as master:
        assert master.doors["grpc"] == f"localhost:{port}"
        assert master.doors["native"] == f"localhost:{port + 1}"
        assert "metrics" not in master.doors
        client = master.grpc(f"localhost:{port}")
        client.register(Registration("n1"), CALL)
        client.close()
        assert master.end() == 0


def test_original_form_gives_way_where_the_next_port_is_taken(tmp_path: Path) -> None:
    port = free_pair()
    with (
        socket.create_server(("127.0.0.1", port + 1)),
        MasterProcess(tmp_path, f"127.0.0.1:{port}", "0", code=POSITIONAL, plain=True) as master,
    ):
        assert "native" not in master.doors
        assert master.says(f"127.0.0.1:{port + 1} is taken, so the native protocol is not served")
        assert master.end() == 0


@pytest.mark.parametrize(
    ("arguments", "listen", "metrics"),
    [
        ([], None, None),
        (["h:1"], "h:1", None),
        (["h:1", "7000"], "h:1", "127.0.0.1:7000"),
        (["h:1", "0"], "h:1", "none"),
        (["h:1", "0.0.0.0:9"], "h:1", "0.0.0.0:9"),
    ],
)
def test_original_form_has_the_originals_arguments_and_defaults(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], listen: str | None, metrics: str | None
) -> None:
    seen: list[tuple[dict[str, object], list[str], dict[str, str]]] = []
    monkeypatch.setattr(cli_master, "run", lambda *given: seen.append(given[:3]))
    monkeypatch.setattr(sys, "argv", ["umbp-master", *arguments])
    with pytest.raises(SystemExit) as end:
        cli_master.main()
    assert not end.value.code
    options, _, defaults = seen[0]
    assert (options["listen"], options["metrics_listen"]) == (listen, metrics)
    assert defaults == {"listen": "0.0.0.0:50051", "native_listen": "auto"}


def test_busy_port_in_the_original_form_is_no_crash(tmp_path: Path) -> None:
    with taken_port() as port:
        done = umbp(tmp_path, f"127.0.0.1:{port}", "0", code=POSITIONAL)
    assert done.returncode == 2
    assert done.stderr.startswith(f"umbp-master: --listen 127.0.0.1:{port} is taken")
