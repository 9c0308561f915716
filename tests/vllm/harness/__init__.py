"""An engine-free vLLM: the installed scheduler, both roles of a KV connector, and a model that can be checked.

``Harness`` drives vLLM's own ``Scheduler`` with real block hashing and a real block pool.  In place of the
workers stand simulated ranks with real KV buffers; in place of the model stands a function from the token
prefix to KV bytes, so that wrong KV is recognised by content before every forward pass.
"""

from tests.vllm.harness.engine import Harness
from tests.vllm.harness.errors import ConnectorFault, KVMismatch, LeakDetected, ReportFault, StuckTransfer
from tests.vllm.harness.spec import EngineSpec, GroupSpec

__all__ = [
    "ConnectorFault",
    "EngineSpec",
    "GroupSpec",
    "Harness",
    "KVMismatch",
    "LeakDetected",
    "ReportFault",
    "StuckTransfer",
]
