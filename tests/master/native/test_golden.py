"""A real server answers the frames that are written down with the ones that are written down."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.master.native.golden import FOLDER, file_of, frames_in, fresh_door, steps
from tests.master.native.harness import Master, RawClient
from umbp_core.wire.frames import FrameType

TEXTS = {137}
"""Messages that end with a sentence for people, which may change."""


def without_text(frame: bytes) -> tuple[bytes, object]:
    """A frame but for its length and the words in it, which nobody may rely on."""
    fields = msgspec.msgpack.decode(frame[40:])
    if frame[8] == FrameType.ERROR or fields[0] in TEXTS:
        assert isinstance(fields.pop(), str)
        return frame[:32] + frame[36:40], fields
    return frame[:40], frame[40:]


def test_the_conversation_is_the_one_that_is_written_down(running: Master, tmp_path: Path) -> None:
    with fresh_door(running, tmp_path / "door") as path, RawClient(path) as raw:
        for number, step in enumerate(steps(), 1):
            written = file_of(number, step).read_text()
            assert frames_in(written, ">") == [step.frame], step.name
            expected = frames_in(written, "<")
            raw.send(step.frame)
            answers = [raw.receive_bytes() for _ in expected]
            assert [without_text(answer) for answer in answers] == [without_text(frame) for frame in expected], (
                step.name
            )
        assert raw.at_end()


def test_nothing_else_is_written_down() -> None:
    assert sorted(FOLDER.glob("*")) == [file_of(number, step) for number, step in enumerate(steps(), 1)]
