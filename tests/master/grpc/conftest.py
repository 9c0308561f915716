"""A master whose clock is in the test's hand, and UMBP's stub for it."""

from collections.abc import Iterator

import pytest

from tests.master.grpc.harness import RunningMaster, Stub


@pytest.fixture
def master() -> Iterator[RunningMaster]:
    with RunningMaster() as running:
        yield running


@pytest.fixture
def call(master: RunningMaster) -> Stub:
    return master.stub()
