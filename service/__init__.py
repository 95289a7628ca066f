"""The gateway: stateful batched sequence inference over gRPC. docs/design.md is the map."""
