"""Runs vLLM's own command line many times, up to the point where a command would start its engine.

stdin: {"model": ..., "commands": {name: [argument, ...]}, "configs": [name, ...]}.  Answers per name with
{"error": text} or the connector in the parsed namespace and, for those in ``configs``, in the engine's configuration.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import sys

task = json.load(sys.stdin)
answers: dict[str, dict[str, object]] = {}
parsed = []

from vllm.entrypoints.cli import main as cli  # noqa: E402
from vllm.entrypoints.cli.benchmark.latency import BenchmarkLatencySubcommand  # noqa: E402
from vllm.entrypoints.cli.benchmark.throughput import BenchmarkThroughputSubcommand  # noqa: E402
from vllm.entrypoints.cli.serve import ServeSubcommand  # noqa: E402

for command in (ServeSubcommand, BenchmarkLatencySubcommand, BenchmarkThroughputSubcommand):
    command.cmd = staticmethod(parsed.append)

from vllm.engine.arg_utils import AsyncEngineArgs  # noqa: E402


def described(config):
    if config is None:
        return None
    return {
        "connector": config.kv_connector,
        "role": config.kv_role,
        "extra": config.kv_connector_extra_config,
    }


def run(arguments, with_config):
    parsed.clear()
    sys.argv = ["vllm", *arguments]
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit:
        return {"error": " ".join(errors.getvalue().partition(": error: ")[2].split())}
    namespace = pickle.loads(pickle.dumps(parsed[0]))
    if getattr(namespace, "model_tag", None):
        namespace.model = namespace.model_tag
    answer = {"namespace": described(namespace.kv_transfer_config), "attributes": sorted(vars(namespace))}
    if with_config:
        arguments = AsyncEngineArgs.from_cli_args(namespace)
        try:
            first, second = arguments.create_engine_config(), arguments.create_engine_config()
        except Exception as error:  # noqa: BLE001  whatever refuses is the answer
            return {**answer, "refused": str(error)}
        answer["config"] = described(first.kv_transfer_config)
        answer["again"] = described(second.kv_transfer_config)
        answer["failure_policy"] = first.kv_transfer_config and first.kv_transfer_config.kv_load_failure_policy
        answer["offloading_size"] = first.cache_config.kv_offloading_size
    return answer


for name, arguments in task["commands"].items():
    answers[name] = run(arguments, name in task["configs"])
sys.stdout.write("\n" + json.dumps(answers) + "\n")
