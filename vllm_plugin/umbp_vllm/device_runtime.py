"""The few calls to a GPU's driver that copies need besides torch operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch

from umbp_vllm.pinning import HostRegistrar


class DeviceRuntime(HostRegistrar, Protocol):
    """Streams and marks of one device.  A mark stands for all work that was on a stream when it was made."""

    def new_stream(self) -> Any:
        """A stream of its own, not ordered with any other."""
        ...

    def on(self, stream: Any) -> AbstractContextManager[None]:
        """Operators of this thread inside the block go to ``stream``."""
        ...

    def upload(self, numbers: torch.Tensor) -> torch.Tensor:
        """``numbers`` on the device, in the order of the current stream; the host does not wait."""
        ...

    def mark(self, stream: Any) -> Any:
        """A mark behind the work on ``stream``; waiting for it puts the thread to sleep."""
        ...

    def mark_current(self) -> Any:
        """A mark behind the work on this thread's current stream; a few microseconds, for the forward thread."""
        ...

    def order_after(self, stream: Any, mark: Any) -> None:
        """What is issued to ``stream`` from now on begins after ``mark``, on the device; the host does not wait."""
        ...

    def wait(self, mark: Any) -> None:
        """Wait, without the GIL, until the work before ``mark`` has ended."""
        ...

    def drain(self, stream: Any) -> None:
        """Wait, without the GIL, until everything on ``stream`` has ended."""
        ...


class TorchCuda:
    """The runtime of CUDA and ROCm through torch; raises ``RuntimeError`` as torch does."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def new_stream(self) -> Any:
        """See :class:`DeviceRuntime`."""
        return torch.cuda.Stream(device=self._device)

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """See :class:`DeviceRuntime`; also lets inference tensors be written."""
        with torch.cuda.device(self._device), torch.cuda.stream(stream), torch.inference_mode():
            yield

    def upload(self, numbers: torch.Tensor) -> torch.Tensor:
        """See :class:`DeviceRuntime`; goes through locked memory, which torch keeps until it is read."""
        return numbers.pin_memory().to(self._device, non_blocking=True)

    def mark(self, stream: Any) -> Any:
        """See :class:`DeviceRuntime`."""
        event = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event

    def mark_current(self) -> Any:
        """See :class:`DeviceRuntime`."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def order_after(self, stream: Any, mark: Any) -> None:
        """See :class:`DeviceRuntime`."""
        stream.wait_event(mark)

    def wait(self, mark: Any) -> None:
        """See :class:`DeviceRuntime`."""
        mark.synchronize()

    def drain(self, stream: Any) -> None:
        """See :class:`DeviceRuntime`."""
        stream.synchronize()

    def register(self, address: int, nbytes: int) -> int:
        """``cudaHostRegister``; torch lets go of the GIL meanwhile."""
        with torch.cuda.device(self._device):  # that of a new thread is the first, which would get a context for it
            return int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0).value)

    def unregister(self, address: int) -> int:
        """``cudaHostUnregister``."""
        with torch.cuda.device(self._device):
            return int(torch.cuda.cudart().cudaHostUnregister(address).value)
