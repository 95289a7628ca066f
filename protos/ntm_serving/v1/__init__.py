"""The public API, version 1: messages and stubs generated from the .proto files beside this one.

`from ntm_serving.v1 import sequence_service_pb2, sequence_service_pb2_grpc`, and likewise `model_service_*` and
`tensor_pb2`. Nothing is imported here, so that a client pays only for what it uses.
"""
