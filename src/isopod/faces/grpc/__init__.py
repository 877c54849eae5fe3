"""The gRPC face: the calls of proto/blixard.proto, served by grpcio and answered by asking the node (docs/grpc.md).

It runs in a process of its own, which the node starts and ends: grpcio costs memory and has threads, and neither belongs into a process
that starts containers. What a hostile client does to that process the node does not feel, and a node without the face never imports it.
"""
