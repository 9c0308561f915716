"""A hundred thousand wrong messages: a master answers every one, and serves as before."""

import asyncio
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.master.grpc.harness import HBM, Stub, matches, methods
from tests.master.grpc.mutations import spoilt

ROOT = Path(__file__).resolve().parents[3]
MESSAGES = 100_000
AT_ONCE = 200
SEED = 20_261_121
MINUTE = 60.0
CODE = grpc.StatusCode
EXPECTED = {CODE.OK, CODE.INTERNAL, CODE.INVALID_ARGUMENT, CODE.ALREADY_EXISTS}


class MasterProcess:
    """``umbp-master``, which tells where it listens."""

    def __init__(self, process: subprocess.Popen[str], target: str) -> None:
        self.process = process
        self.target = target


@pytest.fixture
def master(tmp_path: Path) -> Iterator[MasterProcess]:
    command = [sys.executable, "-m", "umbp_connectors.master", "127.0.0.1:0", "0", "--set", f"state_dir={tmp_path}"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'core'}"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    assert process.stdout is not None
    listens = re.search(r"grpc=(\S+)", process.stdout.readline())
    assert listens is not None
    try:
        yield MasterProcess(process, listens[1])
    finally:
        process.terminate()
        process.wait(MINUTE)
        process.stdout.close()


async def _send(target: str, pairs: list[tuple[str, bytes]]) -> Counter[grpc.StatusCode]:
    """The codes of the answers, of many calls at once."""
    codes: Counter[grpc.StatusCode] = Counter()
    work = iter(pairs)
    async with grpc.aio.insecure_channel(target) as channel:
        calls = {method.name: channel.unary_unary(f"/umbp.UMBPMaster/{method.name}") for method in methods()}

        async def sender() -> None:
            for name, data in work:
                try:
                    await calls[name](data, timeout=MINUTE)
                    codes[CODE.OK] += 1
                except grpc.aio.AioRpcError as error:
                    codes[error.code()] += 1

        await asyncio.gather(*(sender() for _ in range(AT_ONCE)))
    return codes


@pytest.mark.slow
def test_wrong_messages_are_answered_by_errors(master: MasterProcess) -> None:
    pairs = spoilt(random.Random(SEED), [method.name for method in methods()], MESSAGES)
    codes = asyncio.run(_send(master.target, pairs))
    assert sum(codes.values()) == MESSAGES
    assert set(codes) <= EXPECTED, codes
    assert codes[CODE.INTERNAL] > MESSAGES // 10, "too few of them were wrong to tell anything"
    assert master.process.poll() is None
    with grpc.insecure_channel(master.target) as channel:
        call = Stub(channel)
        call("RegisterClient", node_id="good", peer_address="10.0.0.1:1")
        call("ReportExternalKvBlocks", node_id="good", hashes=["only here"], tier=HBM)
        assert matches(call("MatchExternalKv", hashes=["only here"])) == {"good": {HBM: ["only here"]}}
