"""Rewrites ``umbp_connectors/wire_grpc/descriptors.py`` from the ``.proto`` files; ``--check`` only tells.

What is generated is the descriptors and nothing else; ``umbp_connectors/wire_grpc/__init__.py`` says why.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "umbp_connectors" / "master" / "proto"
TARGET = ROOT / "umbp_connectors" / "wire_grpc" / "descriptors.py"
FILES = ("umbp.proto", "umbp_peer.proto")
_PER_LINE = 32


def compiled() -> descriptor_pb2.FileDescriptorSet:
    """The descriptors of the ``.proto`` files as they are now.  Raises ``SystemExit`` where they are wrong."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "umbp.binpb"
        command = ["protoc", f"-I{PROTOS}", f"--descriptor_set_out={output}", *FILES]
        if protoc.main(command) != 0:
            raise SystemExit("protoc refuses the .proto files; its reasons stand above")
        return descriptor_pb2.FileDescriptorSet.FromString(output.read_bytes())


def generated() -> descriptor_pb2.FileDescriptorSet:
    """The descriptors that are checked in; empty when there are none."""
    if not TARGET.exists():
        return descriptor_pb2.FileDescriptorSet()
    return descriptor_pb2.FileDescriptorSet.FromString(runpy.run_path(str(TARGET))["FILE_DESCRIPTOR_SET"])


def source(descriptors: descriptor_pb2.FileDescriptorSet) -> str:
    """The module that holds ``descriptors``."""
    data = descriptors.SerializeToString(deterministic=True)
    lines = [f"    {_literal(data[at : at + _PER_LINE])}\n" for at in range(0, len(data), _PER_LINE)]
    return (
        '"""Generated from umbp_connectors/master/proto/*.proto by scripts/gen_proto.py.  Do not edit."""\n\n'
        f"# fmt: off\nFILE_DESCRIPTOR_SET = (\n{''.join(lines)})\n"
    )


def _literal(data: bytes) -> str:
    """``data`` as Python source, in the quotes that the formatter wants."""
    plain = [chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in data]
    return f'b"{"".join(plain)}"'


def main(arguments: list[str]) -> int:
    """The command line; 1 when ``--check`` finds that the module is not current."""
    now = compiled()
    current = now == generated()
    if "--check" in arguments:
        print("current" if current else f"{TARGET.name} is not current: run scripts/gen_proto.py")
        return 0 if current else 1
    if not current:
        TARGET.write_text(source(now), encoding="utf-8")
    print(f"{TARGET.name}: {'was current' if current else 'written'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
