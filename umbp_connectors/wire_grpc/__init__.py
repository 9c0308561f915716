"""UMBP's gRPC wire: its messages, its bounds, who may use it.  Needs the extra ``grpc``.

Nothing here is imported unless a gRPC address is configured.

**Why no generated classes.**  The module that ``protoc`` writes for Python refuses to be imported under a protobuf
runtime that is older than the compiler or more than one major version newer.  Which runtime that is, an engine decides:
5, 6 and 7 are all in use.  No single generated module runs on all of them, while a serialized ``FileDescriptorSet`` is
itself a protobuf message, which every version reads.  Therefore ``scripts/gen_proto.py`` writes the descriptors
(``descriptors.py``), and ``messages.py`` asks the runtime that is there for classes, by its public interface only
(``DescriptorPool.AddSerializedFile``, ``message_factory.GetMessageClass``; protobuf 4.25 and later).  The descriptors
live in a pool of our own, so that another UMBP package in the same process is no conflict.
"""

try:
    import google.protobuf
    import grpc
except ImportError as missing:
    raise ImportError(
        f"UMBP's gRPC wire needs packages that are not installed ({missing}): "
        "pip install 'umbp-connectors[grpc]', or use a umbp:// address"
    ) from missing

__all__ = ["google", "grpc"]
