"""The command ``umbp``, through its own door."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from umbp_connectors import __version__, cli
from umbp_connectors.config import KEYS
from umbp_connectors.doctor import Finding, Status


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMBP_IO_THREADS", "9")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["umbp", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_config_prints_every_key_with_value_and_origin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "config", "--extra", '{"dram_capacity": "16GiB"}') == 0
    rows = {line.split()[0]: line.split(None, 2)[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert set(KEYS) <= set(rows)
    assert rows["dram_capacity"][0] == "16GiB"
    assert "engine extra-config" in rows["dram_capacity"][1]
    assert "environment UMBP_IO_THREADS" in rows["io_threads"][1]
    assert rows["ssd_capacity"][0] == "32GiB"


def test_config_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "umbp.toml"
    path.write_text('ssd_dir = "/ssd"\nplugins = ["a"]\n', encoding="utf-8")
    assert run(monkeypatch, "config", "--json", "--file", str(path)) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == list(KEYS)
    assert told["ssd_dir"] == {"value": "/ssd", "origin": f"file {path}"}
    assert told["plugins"]["value"] == ["a"]
    assert told["io_threads"] == {"value": 9, "origin": "environment UMBP_IO_THREADS"}


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_config_does_not_tell_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: list[str]
) -> None:
    assert run(monkeypatch, "config", *form) == 0
    assert "(secret)" not in capsys.readouterr().out
    assert run(monkeypatch, "config", *form, "--extra", '{"master_token": "s3cret"}') == 0
    told = capsys.readouterr().out
    assert "(secret)" in told
    assert "s3cret" not in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["config", "--extra", '{"dram_capcity": 1}'], "did you mean 'dram_capacity'?"),
        (["config", "--extra", "{"], "--extra is not JSON"),
        (["config", "--extra", "[1]"], "--extra is not a JSON object"),
        (["config", "--file", "/no/such/file.toml"], "/no/such/file.toml cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("umbp: ")
    assert sentence in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("status", "code"), [(Status.OK, 0), (Status.NOTE, 0), (Status.WARNING, 0), (Status.PROBLEM, 1)]
)
@pytest.mark.parametrize("as_json", [False, True])
def test_doctor_says_what_was_found_and_ends_with_1_on_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: Status, code: int, as_json: bool
) -> None:
    finding = Finding("disk", status, "found [this]", "do that")
    monkeypatch.setattr(cli.examination, "examine", lambda extra, env, file: iter([finding]))
    assert run(monkeypatch, "doctor", *(["--json"] if as_json else [])) == code
    out = capsys.readouterr().out
    if as_json:
        expected = {"topic": "disk", "status": status.value, "found": "found [this]", "advice": "do that"}
        assert json.loads(out) == [expected]
    else:
        assert f"{status.value}  disk: found [this]" in out
        assert "-> do that" in out


def test_doctor_gets_what_the_engine_would_get(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen = []
    monkeypatch.setattr(cli.examination, "examine", lambda *arguments: seen.append(arguments) or iter([]))
    assert run(monkeypatch, "doctor", "--extra", '{"io_threads": 2}', "--file", str(tmp_path / "x.toml")) == 0
    extra, env, file = seen[0]
    assert extra == {"io_threads": 2}
    assert env["UMBP_IO_THREADS"] == "9"
    assert file == str(tmp_path / "x.toml")
    assert "no problems" in capsys.readouterr().out


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "version") == 0
    assert capsys.readouterr().out.strip() == __version__


def as_process(arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """``umbp`` with ``arguments`` and redirections in a shell, as a process whose streams are its own."""
    program = f"{shlex.quote(sys.executable)} -c 'from umbp_connectors.cli import main; main()'"
    path = os.pathsep.join(each for each in sys.path if each)
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(
        ["sh", "-c", f"{program} {arguments}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment | {"PYTHONPATH": path} | (env or {}),
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("config --json >/dev/full", 2, "umbp: [Errno 28] No space left on device\n"),
        ("config >/dev/full", 2, "umbp: [Errno 28] No space left on device\n"),
        ("match - <&-", 2, "umbp: no hashes on standard input; give one per line\n"),
        ("config >&-", 0, ""),
    ],
)
def test_streams_that_are_full_or_closed_cost_one_sentence(arguments: str, code: int, said: str) -> None:
    done = as_process(arguments)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_daemon_serves_without_standard_output(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    door = shlex.quote(str(tmp_path / "x.sock"))
    done = as_process(f"daemon --socket {door} --dram-capacity 1MiB --idle-exit 0.01 >&-")
    assert done.returncode == 0, done.stderr
    assert "the daemon has ended" in done.stderr


def test_a_table_shows_long_values_whole() -> None:
    folder = "/nvme/" + "a-long-name/" * 9 + "pool"
    extra = shlex.quote(json.dumps({"ssd_dir": folder}))
    piped = as_process(f"config --extra {extra}").stdout
    assert any(line.split() == ["ssd_dir", folder, "engine", "extra-config"] for line in piped.splitlines())
    narrow = as_process(f"config --extra {extra}", {"COLUMNS": "60"}).stdout
    heads = next(line for line in narrow.splitlines() if "value" in line)
    start, end = heads.index("value"), heads.index("from")
    assert folder in "".join(line[start:end].strip() for line in narrow.splitlines())
    assert max(map(len, narrow.splitlines())) <= 60


def test_a_table_escapes_what_standard_output_has_no_character_for() -> None:
    extra = shlex.quote(json.dumps({"ssd_dir": "/caf\u00e9"}))
    done = as_process(f"config --extra {extra}", {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "/caf\\xe9" in done.stdout.split()


@pytest.mark.parametrize(
    "arguments", [["nodes", "--timeout", "inf"], ["top", "--interval", "1e300"], ["debug", "dump", "--timeout", "inf"]]
)
def test_what_never_ends_is_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert "86400" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["daemon", "--dram-capacity", "4 bananas"], "dram_capacity = '4 bananas' from command line: a size is"),
        (["daemon", "--set", "dram_capcity=1"], "unknown key 'dram_capcity' in command line; did you mean"),
        (["follow", "--http", "h:1", "--node-tag", "x"], "node_tags = 'x' from command line: 'x' is no tag"),
    ],
)
def test_an_option_that_cannot_be_used_is_named_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert said in capsys.readouterr().err
