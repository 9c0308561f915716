"""What is left of the connector when vLLM's argument classes must not be changed.

stdin: {"first": statement, "model": ...}.
"""

from __future__ import annotations

import json
import sys

task = json.load(sys.stdin)
exec(task["first"])

from vllm import EngineArgs  # noqa: E402
from vllm.config import KVTransferConfig  # noqa: E402
from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: E402

COMMON = {"model": task["model"], "skip_tokenizer_init": True}
parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
config = KVTransferConfig(kv_connector="umbp", kv_role="kv_both")
args = EngineArgs(**COMMON, kv_transfer_config=config)
try:
    EngineArgs(**COMMON, kv_connector="umbp")
    keyword = "taken"
except TypeError:
    keyword = "TypeError"
used = args.create_engine_config().kv_transfer_config
answers = {
    "json": {"connector": used.kv_connector, "role": used.kv_role, "extra": used.kv_connector_extra_config},
    "keyword": keyword,
    "flag": "--kv-connector" in parser._option_string_actions,
    "backend": "umbp" in parser._option_string_actions["--kv-offloading-backend"].choices,
}
sys.stdout.write("\n" + json.dumps(answers) + "\n")
