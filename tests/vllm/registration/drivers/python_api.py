"""Starts from Python, with the import that stands in the task as the very first of vLLM.

stdin: {"first": statement, "model": ...}.  ``LLM`` is stopped where it has built its arguments.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

task = json.load(sys.stdin)
finders = list(sys.meta_path)
exec(task["first"])

import dataclasses  # noqa: E402
import pickle  # noqa: E402
from unittest import mock  # noqa: E402

from vllm import LLM, AsyncEngineArgs, EngineArgs  # noqa: E402
from vllm.config import KVTransferConfig  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402


class Stopped(Exception):
    pass


def stop(engine_args, **_):
    raise Stopped(engine_args)


LLMEngine.from_engine_args = staticmethod(stop)
COMMON = {"model": task["model"], "skip_tokenizer_init": True}


def described(config):
    return config and {
        "connector": config.kv_connector,
        "role": config.kv_role,
        "extra": config.kv_connector_extra_config,
    }


def attempt(make, *, config=False):
    try:
        args = make()
        answer = {"args": described(args.kv_transfer_config)}
        if config:
            answer["config"] = described(args.create_engine_config().kv_transfer_config)
    except Exception as error:  # noqa: BLE001  whatever is raised is the answer
        return {"error": f"{type(error).__name__}: {error}"}
    return answer


def llm(**options):
    try:
        LLM(**COMMON, **options)
    except Stopped as stopped:
        return stopped.args[0]
    raise AssertionError("the engine was built")


given = KVTransferConfig(kv_connector_extra_config={"namespace": "a"}, engine_id="keep-me")
kept = EngineArgs(**COMMON, kv_connector="umbp", kv_transfer_config=given)
children = {
    "connectors": [
        {"kv_connector": "umbp", "kv_role": "kv_both"},
        {"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
    ]
}
example = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
failing = {
    "connectors": [
        {"kv_connector": "umbp", "kv_role": "kv_both", "kv_connector_extra_config": {"load_failure_policy": "fail"}},
        example,
    ]
}
others = {"connectors": [example, example]}
multi = KVTransferConfig(kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config=children)


def policy(extra, **environment):
    config = KVTransferConfig(kv_connector="MultiConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    with mock.patch.dict(os.environ, environment):
        used = EngineArgs(**COMMON, kv_transfer_config=config).create_engine_config().kv_transfer_config
    return used.kv_load_failure_policy


def engines(config):
    """What the engines' configuration says of ``config`` when there are two of them."""
    args = EngineArgs(**COMMON, kv_transfer_config=config, data_parallel_size=2)
    return described(args.create_engine_config().kv_transfer_config)["extra"]


answers = {
    "llm": attempt(lambda: llm(kv_connector="umbp"), config=True),
    "llm_offloading": attempt(lambda: llm(kv_offloading_backend="umbp", kv_offloading_size=4), config=True),
    "llm_dict": attempt(lambda: llm(kv_transfer_config={"kv_connector": "umbp", "kv_role": "kv_both"})),
    "engine_args": attempt(lambda: EngineArgs(**COMMON, kv_connector="umbp")),
    "async_engine_args": attempt(lambda: AsyncEngineArgs(**COMMON, kv_connector="umbp")),
    "plain": attempt(lambda: EngineArgs(**COMMON)),
    "merged": attempt(lambda: kept),
    "merged_engine_id": kept.kv_transfer_config and kept.kv_transfer_config.engine_id,
    "given_untouched": given.kv_connector is None,
    "dict_with_policy": attempt(
        lambda: EngineArgs(**COMMON, kv_connector="umbp", kv_transfer_config={"kv_load_failure_policy": "fail"})
    ),
    "conflict": attempt(
        lambda: EngineArgs(
            **COMMON,
            kv_connector="umbp",
            kv_transfer_config=KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both"),
        )
    ),
    "unknown_name": attempt(lambda: EngineArgs(**COMMON, kv_connector="nobody")),
    "unknown_keyword": attempt(lambda: EngineArgs(**COMMON, kv_konnector="umbp")),
    "other_backend": attempt(
        lambda: EngineArgs(**COMMON, kv_connector="umbp", kv_offloading_backend="lmcache", kv_offloading_size=1),
        config=True,
    ),
    "fields": sorted(field.name for field in dataclasses.fields(EngineArgs)),
    "pickle": described(pickle.loads(pickle.dumps(kept)).kv_transfer_config),
    "replaced": described(dataclasses.replace(kept, seed=1).kv_transfer_config),
    "registered": "umbp" in KVConnectorFactory._registry,
    "new_finders": [type(f).__name__ for f in sys.meta_path if f not in finders and "umbp" in type(f).__module__],
}
if "umbp" in KVConnectorFactory._registry:
    answers["class"] = KVConnectorFactory.get_connector_class_by_name("umbp").__name__
    answers["multi_hma"] = KVConnectorFactory.supports_hma_config(
        KVTransferConfig(
            kv_connector="MultiConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"connectors": children["connectors"][:1]},
        )
    )
    answers["multi"] = attempt(lambda: EngineArgs(**COMMON, kv_transfer_config=multi), config=True)
    answers["multi_policies"] = [policy(children), policy(failing), policy(others)]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write('load_failure_policy = "fail"\n')
        file.flush()
        answers["multi_policies_elsewhere"] = {
            "environment": policy(children, UMBP_LOAD_FAILURE_POLICY="fail"),
            "file": policy(children, UMBP_CONFIG=file.name),
        }
    two = KVTransferConfig(kv_connector="umbp", kv_role="kv_both", kv_connector_extra_config={"namespace": "a"})
    said = {"ssd_engines": 4}
    four = KVTransferConfig(kv_connector="umbp", kv_role="kv_both", kv_connector_extra_config=said)
    answers["two_engines"] = [engines(two), engines(four), engines(multi)]
    answers["two_untouched"] = [two.kv_connector_extra_config, multi.kv_connector_extra_config == children]
    answers["multi_untouched"] = multi.kv_load_failure_policy
sys.stdout.write("\n" + json.dumps(answers) + "\n")
