"""``EngineArgs`` learns ``kv_connector="umbp"`` and ``kv_offloading_backend="umbp"``, in memory only.

All short forms end as one ``KVTransferConfig``, vLLM's own way to name a connector.  No field is added to
the dataclass, so copies, pickles and ``asdict`` of it are what they were.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from umbp_core.errors import ConfigError

CONNECTOR = "umbp"
"""The connector's name in vLLM."""
ROLE = "kv_both"
"""What a cache is for vLLM: it both takes and gives KV."""
SIZE_KEY = "cpu_bytes_to_use"
"""The key of the connector's extra config that ``--kv-offloading-size`` becomes, as in vLLM's own offloading."""

MULTI = "MultiConnector"
"""vLLM's connector that asks several others."""
ENGINES_KEY = "ssd_engines"
"""The key of the connector's extra config that says how many engines share the SSD folder."""
POLICY_KEY = "load_failure_policy"
"""The key of the connector's extra config that says what a failed load means for its request."""

SERVING_KEY = "serving"
"""The key of the connector's extra config that says where the API server listens, ``HOST:PORT``."""

_MARK = "umbp_hook"
_WHERE = "_umbp_serving"
"""What ``from_cli_args`` leaves on the object it makes, besides the fields."""
_NATIVE = "native"
_VLLM_POLICY = "kv_load_failure_policy"
_NEEDED = frozenset({"kv_transfer_config", "kv_offloading_backend", "kv_offloading_size"})


def install(arg_utils: Any) -> None:
    """Extend the argument classes of ``arg_utils`` (the module ``vllm.engine.arg_utils``).  Idempotent.

    Steps aside where vLLM has a ``kv_connector`` of its own.  Raises ``AttributeError`` or ``LookupError`` when
    the module is not as expected; nothing was changed then.
    """
    from umbp_vllm import cli_flags

    classes = [arg_utils.EngineArgs, arg_utils.AsyncEngineArgs]
    fields = {field.name for field in dataclasses.fields(classes[0])}
    if "kv_connector" in fields:
        return
    if not fields >= _NEEDED:
        raise LookupError(f"EngineArgs has no {', '.join(sorted(_NEEDED - fields))}")
    base = classes[0]
    add_cli_args, create_engine_config = base.add_cli_args, base.create_engine_config
    for cls in classes:
        _wrap(cls, "__init__", _accepting_connector)
    if not _is_hook(create_engine_config):
        base.create_engine_config = _mark(_translating(create_engine_config))
    from_cli_args = vars(base).get("from_cli_args")
    if isinstance(from_cli_args, classmethod) and not _is_hook(from_cli_args.__func__):
        base.from_cli_args = classmethod(_mark(_noting_where(from_cli_args.__func__)))
    if not _is_hook(add_cli_args):
        base.add_cli_args = staticmethod(_mark(cli_flags.extending(add_cli_args, arg_utils)))


def with_connector(config: Any, connector: str) -> Any:
    """A complete ``KVTransferConfig`` for ``connector`` that keeps everything else of ``config``.

    ``config`` is one, a dict with its fields, or ``None``.  Raises ``ConfigError`` when it names another
    connector, or when ``connector`` is not ours.
    """
    if connector != CONNECTOR:
        raise ConfigError(
            f"kv_connector={connector!r} is not known; the short form takes {CONNECTOR!r} only, "
            "other connectors are named in kv_transfer_config"
        )
    if config is None:
        config = {}
    values = dict(config) if isinstance(config, dict) else _fields_of(config)
    other = values.get("kv_connector") or CONNECTOR
    if other != CONNECTOR:
        raise ConfigError(
            f"kv_connector={CONNECTOR!r} and a kv_transfer_config for {other!r} exclude each other; drop one of "
            "them, or put both connectors under MultiConnector in kv_transfer_config"
        )
    values["kv_connector"] = CONNECTOR
    values["kv_role"] = values.get("kv_role") or ROLE
    made = importlib.import_module("vllm.config").KVTransferConfig(**values)
    return with_chosen_policy(made, config) if isinstance(config, dict) else made


def with_chosen_policy(config: Any, given: dict[str, Any]) -> Any:
    """``config`` (a ``KVTransferConfig``) with the failure policy of the fields ``given`` where umbp looks for it.

    A chosen ``fail`` cannot be told from vLLM's default once the object is made.  A config that names no connector may
    become umbp's.
    """
    if given.get(_VLLM_POLICY) is None:
        return config
    return _saying(config, POLICY_KEY, config.kv_load_failure_policy, ours=(CONNECTOR, None))


def with_offloading_size(config: Any, gibibytes: float | None) -> Any:
    """``config`` (a ``KVTransferConfig`` for umbp) with the DRAM size that ``--kv-offloading-size`` gives.

    Raises ``ConfigError`` when the extra config already has another size.
    """
    if gibibytes is None:
        return config
    size = int(gibibytes * (1 << 30))
    extra = dict(config.kv_connector_extra_config)
    if extra.setdefault(SIZE_KEY, size) != size:
        raise ConfigError(
            f"kv_offloading_size={gibibytes:g} (GiB) and {SIZE_KEY}={extra[SIZE_KEY]} in kv_connector_extra_config "
            "disagree; drop one of them"
        )
    return dataclasses.replace(config, kv_connector_extra_config=extra)


def translate_offloading(args: Any) -> None:
    """Turn the offloading options of an ``EngineArgs`` that mean umbp into its ``kv_transfer_config``.

    They mean umbp when the backend is ``umbp`` (with or without a size), and when a size stands beside
    ``kv_connector="umbp"``, where vLLM would silently replace the connector by its own.  The options are back
    at their defaults then, which also makes a second call harmless.  Raises ``ConfigError`` for contradictions.
    """
    backend = args.kv_offloading_backend
    config = args.kv_transfer_config
    ours = config is not None and config.kv_connector == CONNECTOR
    if backend != CONNECTOR and not (ours and args.kv_offloading_size is not None):
        return
    if backend not in (CONNECTOR, _NATIVE, None):
        raise ConfigError(
            f"kv_offloading_backend={backend!r} and the connector {CONNECTOR!r} exclude each other; drop one of them"
        )
    args.kv_transfer_config = with_offloading_size(with_connector(config, CONNECTOR), args.kv_offloading_size)
    args.kv_offloading_backend = type(args).kv_offloading_backend
    args.kv_offloading_size = None


def let_children_recompute(args: Any) -> None:
    """Make a failed load recomputed when umbp is a child of ``MultiConnector``, unless its configuration says ``fail``.

    vLLM's default fails the request.  The scheduler reads the policy of the parent, and our connector, which sets
    it where it stands alone, gets a configuration of its own there and does not reach it.  Raises ``ConfigError`` for
    a bad configuration of the child.
    """
    config = args.kv_transfer_config
    if config is None or config.kv_connector != MULTI:
        return
    ours = [c for c in _children(config.kv_connector_extra_config) if c.get("kv_connector") == CONNECTOR]
    if ours and all(_policy_of(child) == "recompute" for child in ours) and config.kv_load_failure_policy == "fail":
        args.kv_transfer_config = dataclasses.replace(config, kv_load_failure_policy="recompute")


def _policy_of(child: dict[str, Any]) -> str:
    """What the child, the environment or the TOML file says of a failed load."""
    from umbp_connectors.config import resolve

    extra = {POLICY_KEY: child.get(_VLLM_POLICY), **_extra_of(child)}
    return resolve(extra={key: value for key, value in extra.items() if key != SERVING_KEY}).config.load_failure_policy


def count_engines(vllm_config: Any) -> None:
    """Tell umbp how many data-parallel engines there are: vLLM hides it from the engines of a dense model.

    They share the SSD folder and its capacity.  What the user says about it stays.
    """
    engines = vllm_config.parallel_config.data_parallel_size
    if engines > 1:
        vllm_config.kv_transfer_config = _saying(vllm_config.kv_transfer_config, ENGINES_KEY, engines)


def say_where(args: Any) -> None:
    """Tell umbp where the API server listens, which no engine knows."""
    where = vars(args).get(_WHERE)
    if where is not None:
        args.kv_transfer_config = _saying(args.kv_transfer_config, SERVING_KEY, where)


def _noting_where(original: Callable[..., Any]) -> Callable[..., Any]:
    """A server on a Unix socket, and a process without one (``--headless``), listen nowhere."""

    @functools.wraps(original)
    def from_cli_args(cls: Any, args: Any) -> Any:
        made = original(cls, args)
        given = vars(args)
        if given.get("port") is not None and not given.get("uds") and not given.get("headless"):
            vars(made)[_WHERE] = f"{given.get('host') or ''}:{given['port']}"
        return made

    return from_cli_args


def _saying(config: Any, key: str, value: object, ours: Sequence[str | None] = (CONNECTOR,)) -> Any:
    """``config`` (a ``KVTransferConfig`` or ``None``) with ``value`` wherever it is for umbp and says nothing of it.

    ``ours`` are the connectors' names that stand for umbp.
    """
    if config is None:
        return None
    extra = config.kv_connector_extra_config
    if config.kv_connector in ours:
        extra = {key: value, **extra}
    elif config.kv_connector == MULTI:
        extra = {**extra, "connectors": [_child_saying(child, key, value) for child in _children(extra)]}
    else:
        return config
    return dataclasses.replace(config, kv_connector_extra_config=extra)


def _child_saying(child: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    if child.get("kv_connector") != CONNECTOR:
        return child
    return {**child, "kv_connector_extra_config": {key: value, **_extra_of(child)}}


def _children(extra: dict[str, Any]) -> Sequence[dict[str, Any]]:
    """The connectors under a ``MultiConnector`` with this extra config."""
    return extra.get("connectors") or ()


def _extra_of(child: dict[str, Any]) -> dict[str, Any]:
    return child.get("kv_connector_extra_config") or {}


def _fields_of(config: Any) -> dict[str, Any]:
    return {field.name: vars(config)[field.name] for field in dataclasses.fields(config) if field.init}


def _accepting_connector(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, kv_connector: str | None = None, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        if kv_connector is not None:
            self.kv_transfer_config = with_connector(self.kv_transfer_config, kv_connector)

    return __init__


def _translating(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        translate_offloading(self)
        let_children_recompute(self)
        say_where(self)
        vllm_config = original(self, *args, **kwargs)
        count_engines(vllm_config)
        return vllm_config

    return create_engine_config


def _wrap(cls: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace the method that ``cls`` defines or inherits, once."""
    method = vars(cls).get(name)
    if method is not None and not _is_hook(method):
        setattr(cls, name, _mark(wrapper(method)))


def _mark(function: Any) -> Any:
    vars(function)[_MARK] = True
    return function


def _is_hook(function: Any) -> bool:
    return _MARK in vars(function)
