"""What holds for all tests."""

import importlib.util

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("umbp", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("umbp")


def _has_device() -> bool:
    """Whether torch is installed and sees a GPU (CUDA, or ROCm under the same name)."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return bool(torch.cuda.is_available())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests marked ``gpu`` where there is none; torch is imported only if there are such tests."""
    wanting = [item for item in items if item.get_closest_marker("gpu") is not None]
    if wanting and not _has_device():
        items[:] = [item for item in items if item not in wanting]
        config.hook.pytest_deselected(items=wanting)
