"""The arena: shared memory, prefaulting, limits, a second process."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.connectors.gate import Gate
from umbp_connectors.pool import machine
from umbp_connectors.pool.arena import Arena
from umbp_connectors.pool.machine import MemoryLimits
from umbp_core.errors import ConfigError, StateError, TierUnavailable

PAGE = 8192


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(PAGE, pages=6, staging_pages=2)
    arena.open()
    yield arena
    arena.close()


def test_pages_are_views_of_one_zeroed_array(arena: Arena) -> None:
    assert arena.array.shape == (8, PAGE)
    assert arena.nbytes == 8 * PAGE
    assert not arena.array.any()
    arena.page(7, 3)[:] = b"abc"
    assert bytes(arena.array[7, :4]) == b"abc\0"
    assert arena.page(0).nbytes == PAGE
    assert arena.address % 4096 == 0


@pytest.mark.parametrize(("index", "nbytes"), [(8, None), (-1, None), (0, PAGE + 1), (0, -1)])
def test_what_is_outside_is_refused(arena: Arena, index: int, nbytes: int | None) -> None:
    with pytest.raises(StateError, match="outside"):
        arena.page(index, nbytes)


@pytest.mark.parametrize("shape", [(0, 1, 0), (4096, -1, 4), (4096, 0, 0)])
def test_an_arena_needs_a_page(shape: tuple[int, int, int]) -> None:
    with pytest.raises(StateError):
        Arena(*shape)


def test_open_and_close_may_be_repeated() -> None:
    arena = Arena(PAGE, 2)
    with pytest.raises(StateError, match="not open"):
        arena.page(0)
    arena.open()
    fd = arena.fd
    arena.open()
    assert arena.fd == fd
    arena.close()
    arena.close()
    with pytest.raises(StateError, match="not open"):
        arena.array  # noqa: B018
    arena.open()
    assert not arena.array.any()
    arena.close()


def test_a_view_survives_close_and_close_does_not_wait_for_it() -> None:
    arena = Arena(PAGE, 2)
    arena.open()
    view, array = arena.page(1), arena.array
    view[:5] = b"still"
    arena.close()
    assert bytes(view[:5]) == b"still"
    assert bytes(array[1, :5]) == b"still"


def test_the_descriptor_is_not_inherited(arena: Arena) -> None:
    assert not os.get_inheritable(arena.fd)


def test_prefaulting_makes_everything_present_and_changes_nothing() -> None:
    arena = Arena(1 << 20, pages=96)
    arena.open()
    arena.array[50, :4] = 7
    assert arena.wait_prefaulted(60)
    assert arena.progress == 1.0
    assert arena.prefaulted_bytes == arena.nbytes
    assert os.fstat(arena.fd).st_blocks * 512 == arena.nbytes
    assert arena.array[50, :5].tolist() == [7, 7, 7, 7, 0]
    arena.close()


def test_without_prefault_nothing_is_present() -> None:
    arena = Arena(1 << 20, pages=16, prefault=False)
    arena.open()
    assert arena.wait_prefaulted(0)
    assert os.fstat(arena.fd).st_blocks == 0
    assert arena.progress == 0.0
    arena.close()


def test_old_kernels_prefault_by_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, nbytes: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(machine, "populate", refuse)
    arena = Arena(1 << 20, pages=8)
    arena.open()
    assert arena.wait_prefaulted(60)
    assert arena.progress == 1.0
    assert os.fstat(arena.fd).st_blocks * 512 == arena.nbytes
    arena.close()


def test_prefaulting_stops_when_memory_runs_short(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(machine, "memory_to_spare", lambda: 100 << 20)
    arena = Arena(1 << 20, pages=64)
    with caplog.at_level(logging.WARNING):
        arena.open()
        assert arena.wait_prefaulted(60)
    assert arena.progress == 0.0
    assert "smaller dram_capacity" in caplog.text
    arena.array[63] = 1
    arena.close()


def test_closing_stops_prefaulting(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr(machine, "populate", gate)
    arena = Arena(32 << 20, pages=4)
    arena.open()
    gate.wait_until_held()
    assert not arena.wait_prefaulted(0)
    closer = threading.Thread(target=arena.close)
    closer.start()
    assert arena._stop.wait(60)
    gate.open()
    closer.join(60)
    assert not closer.is_alive()
    assert arena.progress == 0.25


def test_an_arena_larger_than_the_machine_is_a_configuration_error() -> None:
    arena = Arena(1 << 30, pages=1 << 20)
    with pytest.raises(ConfigError, match="does not fit this machine") as caught:
        arena.open()
    assert "GiB of physical memory" in str(caught.value)
    assert "set a smaller dram_capacity" in str(caught.value)


def test_the_container_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_limits", lambda: MemoryLimits(1 << 40, 1 << 20))
    with pytest.raises(ConfigError, match="container"):
        Arena(1 << 20, pages=2).open()


def test_memory_that_the_system_refuses_makes_the_tier_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "memfd_create", refuse)
    with pytest.raises(TierUnavailable, match="Cannot allocate memory"):
        Arena(PAGE, 1).open()


def test_huge_pages_fall_back_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create = os.memfd_create

    def no_huge_pages(name: str, flags: int) -> int:
        if flags & os.MFD_HUGETLB:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", no_huge_pages)
    arena = Arena(PAGE, 4, huge_pages=True)
    with caplog.at_level(logging.WARNING):
        arena.open()
    assert [record.message for record in caplog.records if "huge pages" in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1
    assert "vm.nr_hugepages" in caplog.text
    arena.page(3)[:2] = b"ok"
    arena.close()


def test_huge_pages_round_the_mapping_up_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    create, flags = os.memfd_create, []

    def pretend(name: str, flag: int) -> int:
        flags.append(flag)
        return create(name, flag & ~os.MFD_HUGETLB)

    monkeypatch.setattr(os, "memfd_create", pretend)
    arena = Arena(PAGE, 5, staging_pages=1, huge_pages=True)
    arena.open()
    unit = machine.meminfo("Hugepagesize")
    assert len(flags) == 1
    assert flags[0] & os.MFD_HUGETLB
    assert os.fstat(arena.fd).st_size == unit
    assert arena.array.shape == (6, PAGE)
    assert arena.wait_prefaulted(60)
    assert arena.progress == 1.0
    other = Arena.attach(os.getpid(), arena.fd, PAGE, 5, 1)
    other.page(5, 2)[:] = b"ok"
    assert bytes(arena.page(5, 2)) == b"ok"
    other.close()
    arena.close()


@pytest.mark.parametrize("number", [errno.EFAULT, errno.ENOMEM])
def test_prefaulting_that_the_kernel_refuses_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(address: int, nbytes: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(machine, "populate", refuse)
    arena = Arena(32 << 20, pages=3)
    with caplog.at_level(logging.WARNING):
        arena.open()
        assert arena.wait_prefaulted(60)
    assert arena.progress == 0.0
    assert len(caplog.records) == 1
    assert os.strerror(number) in caplog.text
    arena.close()


def test_a_numa_node_that_is_there_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    arena = Arena(PAGE, 4, numa_node=0)
    with caplog.at_level(logging.WARNING):
        arena.open()
    assert not caplog.records
    arena.close()


@pytest.mark.skipif(not Path("/proc/self/numa_maps").exists(), reason="the kernel has no NUMA")
@pytest.mark.parametrize(("node", "policy"), [(0, "prefer"), (-1, "default")])
def test_the_kernel_takes_the_pages_from_the_numa_node_that_is_asked_for(node: int, policy: str) -> None:
    arena = Arena(1 << 21, 4, numa_node=node)
    arena.open()
    places = [line.split() for line in Path("/proc/self/numa_maps").read_text(encoding="ascii").splitlines()]
    policies = {int(begin, 16): found for begin, found, *_ in places}
    assert policies[arena.address].startswith(policy)
    assert policy == "default" or policies[arena.address].endswith(f":{node}")
    arena.close()


def test_a_numa_node_that_is_not_there_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    arena = Arena(PAGE, 4, numa_node=900)
    with caplog.at_level(logging.WARNING):
        arena.open()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "NUMA node 900" in caplog.text
    arena.page(3)[:2] = b"ok"
    arena.close()


def test_private_memory_is_this_process_alone(caplog: pytest.LogCaptureFixture) -> None:
    arena = Arena(1 << 20, pages=96, shared=False)
    arena.open()
    with pytest.raises(StateError, match="open it as shared"):
        _ = arena.fd
    assert not arena.array.any()
    arena.array[50, :4] = 7
    assert arena.wait_prefaulted(60)
    assert arena.progress == 1.0
    assert arena.array[50, :5].tolist() == [7, 7, 7, 7, 0]
    kept = arena.page(50, 4)
    arena.close()
    arena.close()
    assert bytes(kept) == bytes([7, 7, 7, 7])
    assert not caplog.records


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no huge pages")
def test_private_memory_may_be_huge_pages() -> None:
    """The kernel decides, but it knows that it may; about shared memory it knows so too."""
    for shared in (False, True):
        arena = Arena(1 << 21, pages=4, prefault=False, shared=shared)
        arena.open()
        flags: dict[int, str] = {}
        begin = 0
        for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
            first, _, rest = line.partition(" ")
            if not first.endswith(":"):
                begin = int(first.partition("-")[0], 16)
            elif first == "VmFlags:":
                flags[begin] = rest
        found = next(flags[begin] for begin in sorted(flags, reverse=True) if begin <= arena.address).split()
        assert "hg" in found
        assert ("wf" in found) is not shared
        arena.close()


def test_a_forked_child_finds_nothing_in_private_memory() -> None:
    script = """
        import os
        from umbp_connectors.pool.arena import Arena
        arena = Arena(1 << 21, 4, prefault=False, shared=False)
        arena.open()
        arena.array[:] = 1
        child = os.fork()
        if child == 0:
            found = arena.array.any()
            arena.array[:] = 2
            arena.close()
            os._exit(int(found))
        assert os.waitpid(child, 0)[1] == 0
        assert (arena.array == 1).all()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=60, env=_env())
    assert done.returncode == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_old_kernels_have_shared_memory_instead(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(address: int, nbytes: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(machine, "populate", refuse)
    arena = Arena(1 << 20, pages=8, shared=False)
    arena.open()
    assert arena.wait_prefaulted(60)
    assert os.fstat(arena.fd).st_blocks * 512 == arena.nbytes
    arena.close()


def test_private_memory_that_is_refused_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, nbytes: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(machine, "populate", refuse)
    with pytest.raises(TierUnavailable, match="smaller dram_capacity"):
        Arena(1 << 20, pages=8, shared=False).open()


def test_another_process_maps_the_same_pages(arena: Arena) -> None:
    script = """
        import sys
        from umbp_connectors.pool.arena import Arena
        pid, fd = map(int, sys.argv[1:])
        other = Arena.attach(pid, fd, 8192, 6, 2)
        assert bytes(other.page(2, 5)) == b"hello"
        other.page(7, 5)[:] = b"there"
        other.close()
    """
    arena.page(2, 5)[:] = b"hello"
    arguments = [str(os.getpid()), str(arena.fd)]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), *arguments], check=True, timeout=60, env=_env())
    assert bytes(arena.page(7, 5)) == b"there"


def test_attached_pages_outlive_their_owner(arena: Arena) -> None:
    other = Arena.attach(os.getpid(), arena.fd, PAGE, 6, 2)
    arena.page(0, 3)[:] = b"abc"
    arena.close()
    assert bytes(other.page(0, 3)) == b"abc"
    assert other.progress == 1.0
    other.close()


def test_attaching_refuses_what_is_not_that_arena(arena: Arena) -> None:
    with pytest.raises(TierUnavailable, match="not an arena"):
        Arena.attach(os.getpid(), 0, PAGE, 6, 2)
    with pytest.raises(TierUnavailable, match="same configuration"):
        Arena.attach(os.getpid(), arena.fd, PAGE, 600, 2)
    with pytest.raises(TierUnavailable, match="cannot be mapped"):
        Arena.attach(os.getpid(), 9999, PAGE, 6, 2)


def test_threads_may_write_while_the_arena_is_being_prefaulted() -> None:
    arena = Arena(1 << 20, pages=128)
    arena.open()

    def fill(start: int) -> None:
        for page in range(start, 128, 2):
            np.copyto(arena.page_array(page), np.uint8(page + 1))

    writers = [threading.Thread(target=fill, args=(start,)) for start in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert arena.wait_prefaulted(60)
    assert (arena.array == np.arange(1, 129, dtype=np.uint8)[:, None]).all()
    arena.close()


def _env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
