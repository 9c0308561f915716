"""The page of the pool: its program runs and prints what it says."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pool.md"


def test_the_program_prints_what_the_page_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("UMBP_SSD_DIR", "UMBP_CONFIG", "UMBP_MASTER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    promised = re.findall(r"^print\(.*\)\s+# ([\w.]+)", program, re.MULTILINE)
    exec(compile(program, str(PAGE), "exec"), {})
    assert capsys.readouterr().out.split() == promised == ["PutStatus.STORED", "GetStatus.DRAM", "1", "True"]
