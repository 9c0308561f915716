"""The door of a live process and the commands that ask there (statement 94)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from umbp_connectors.cli import app
from umbp_connectors.debug.asking import NoAnswer, ask, doors
from umbp_connectors.debug.desk import SnapshotDesk
from umbp_connectors.debug.door import QUESTION_BYTES, DebugDoor, Question, folder_of
from umbp_connectors.debug.window import Window

STATE = {
    "step": 7,
    "requests": [{"slot": "a#1", "life": "ONBOARDING"}, {"slot": "b#2", "life": "DECODING"}],
    "ops": [{"op": "op-1", "request": "a", "age_s": 12.5}],
    "tiers": [],
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: that of a Unix socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="umbp-") as name:
        yield Path(name) / "doors"


def run(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["debug", "dump", "--timeout", "60", *arguments])
    return done.exit_code, done.stdout, done.stderr


class TestDesk:
    def test_the_owner_makes_it_between_two_steps(self) -> None:
        made: list[threading.Thread] = []
        desk = SnapshotDesk(lambda: {"by": made.append(threading.current_thread()) or "owner"}, patience_s=30)
        found: list[object] = []
        asker = threading.Thread(target=lambda: found.append(desk.take()))
        asker.start()
        while not made:
            desk.serve()
        asker.join(30)
        assert found == [{"taken": "between two steps", "by": "owner"}]
        assert made == [threading.current_thread()]
        assert not desk.asked

    def test_an_owner_that_does_not_come_is_not_waited_for(self) -> None:
        desk = SnapshotDesk(lambda: {"n": 1}, patience_s=0.01)
        assert desk.take() == {"taken": "from outside: no step came", "n": 1}
        assert not desk.asked, "nobody waits any more, so the owner need not make anything"

    def test_what_changes_while_it_is_read_is_read_again(self) -> None:
        rounds = iter([RuntimeError("changed size"), RuntimeError("changed size"), None])

        def make() -> dict[str, int]:
            problem = next(rounds)
            if problem is not None:
                raise problem
            return {"n": 3}

        assert SnapshotDesk(make, patience_s=0.01).take()["n"] == 3

    def test_what_never_holds_still_is_said(self) -> None:
        def make() -> dict[str, int]:
            raise RuntimeError("changed size")

        with pytest.raises(RuntimeError, match="ask again"):
            SnapshotDesk(make, patience_s=0.01).take()


@pytest.mark.statement("connector", 94)
class TestDoor:
    def test_says_what_the_process_is_doing(self, folder: Path) -> None:
        door = DebugDoor("part", lambda: STATE, folder)
        assert door.open()
        (path,) = doors(folder)
        answer = ask(path, Question(), 60)
        door.close()
        assert answer is not None
        assert {name: answer[name] for name in STATE} == STATE
        assert (answer["door"], answer["pid"]) == ("part", os.getpid())
        assert doors(folder) == []

    def test_with_stacks_it_says_where_every_thread_is(self, folder: Path) -> None:
        door = DebugDoor("part", lambda: STATE, folder)
        door.open()
        answer = ask(doors(folder)[0], Question(stacks=True), 60)
        door.close()
        assert answer is not None
        ours = [frames for name, frames in answer["threads"].items() if name.startswith("MainThread")]
        assert any("test_door.py" in frame for frame in ours[0])

    def test_only_this_user_reaches_it(self, folder: Path) -> None:
        door = DebugDoor("part", lambda: STATE, folder)
        door.open()
        assert (folder.stat().st_mode & 0o777, doors(folder)[0].stat().st_mode & 0o777) == (0o700, 0o600)
        door.close()

    def test_a_folder_that_others_can_enter_is_not_used(self, folder: Path) -> None:
        folder.mkdir(mode=0o755)
        folder.chmod(0o755)
        door = DebugDoor("part", lambda: STATE, folder)
        assert not door.open()
        assert doors(folder) == []
        door.close()

    def test_the_same_name_twice_in_a_process(self, folder: Path) -> None:
        first, second = (DebugDoor("part", lambda n=n: {"n": n}, folder) for n in (1, 2))
        first.open()
        second.open()
        assert {(answer or {})["n"] for answer in (ask(path, Question(), 60) for path in doors(folder))} == {1, 2}
        first.close()
        second.close()
        first.close()

    def test_a_state_that_cannot_be_had_is_said(self, folder: Path) -> None:
        door = DebugDoor("part", lambda: {"n": 1 // 0}, folder)
        door.open()
        answer = ask(doors(folder)[0], Question(stacks=True), 60)
        door.close()
        assert answer is not None
        assert answer["problem"].startswith("ZeroDivisionError")
        assert answer["threads"]

    @pytest.mark.parametrize("question", [b"x" * (QUESTION_BYTES * 3), b"[1]\n", b'{"unknown": 1}\n', b"\xff\n"])
    def test_other_questions_end_their_connection_only(self, folder: Path, question: bytes) -> None:
        door = DebugDoor("part", lambda: STATE, folder)
        door.open()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stranger:
            stranger.settimeout(60)
            stranger.connect(str(doors(folder)[0]))
            try:
                stranger.sendall(question)
                assert stranger.recv(1) == b""
            except ConnectionError:
                pass  # it was too long, and the rest of it was not even read
        assert ask(doors(folder)[0], Question(), 60) is not None
        door.close()

    def test_what_a_dead_process_left_is_swept_up(self, folder: Path) -> None:
        code = f"""
import pathlib, os
from umbp_connectors.debug.door import DebugDoor
DebugDoor("part", dict, pathlib.Path({str(folder)!r})).open() or os._exit(1)
os._exit(0)
"""
        for _ in range(2):
            subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={"PYTHONPATH": ":".join(sys.path)})
        (left,) = doors(folder)
        assert ask(left, Question(), 60) is None
        assert doors(folder) == []

    def test_a_process_that_does_not_answer_is_named(self, folder: Path) -> None:
        folder.mkdir(mode=0o700)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mute:
            mute.bind(str(folder / "part.1.sock"))
            mute.listen(1)
            with pytest.raises(NoAnswer, match=r"part\.1\.sock"):
                ask(folder / "part.1.sock", Question(), 0.05)
            code, _, problems = run("--dir", str(folder), "--timeout", "0.1")
        assert code == 1
        assert "part.1.sock does not answer" in problems


class TestCommand:
    @pytest.fixture
    def opened(self, folder: Path) -> Iterator[Path]:
        window = Window("vllm-leader", lambda: STATE, folder)
        assert window.open()
        yield folder
        window.close()

    def test_for_people(self, opened: Path) -> None:
        code, out, _ = run("--dir", str(opened))
        assert code == 0
        assert f"vllm-leader of process {os.getpid()}" in out
        assert "step: 7" in out
        assert "ONBOARDING" in out
        assert "12.5" in out

    def test_for_programs(self, opened: Path) -> None:
        code, out, _ = run("--dir", str(opened), "--json", "--pid", str(os.getpid()))
        assert code == 0
        (answer,) = json.loads(out)
        assert answer["requests"] == STATE["requests"]

    def test_of_one_request(self, opened: Path) -> None:
        _, out, _ = run("--dir", str(opened), "--json", "--request", "b#2")
        (answer,) = json.loads(out)
        assert (answer["requests"], answer["ops"]) == ([{"slot": "b#2", "life": "DECODING"}], [])

    def test_with_stacks(self, opened: Path) -> None:
        _, out, _ = run("--dir", str(opened), "--stacks")
        assert "thread MainThread" in out

    @pytest.mark.parametrize("arguments", [["--pid", "1"], []])
    def test_nobody_there(self, folder: Path, arguments: list[str]) -> None:
        code, _, problems = run("--dir", str(folder), *arguments)
        assert code == 1
        assert "no live engine has a door" in problems


def test_the_usual_folder_is_the_users_own() -> None:
    assert folder_of() == Path(tempfile.gettempdir()) / f"umbp-debug-{os.geteuid()}"
    assert folder_of(7).name == "umbp-debug-7"
