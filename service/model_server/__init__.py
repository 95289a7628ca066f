"""ntm-model-server: the PredictionService and ModelService of TensorFlow Serving, over SavedModels run by TensorFlow.

For laptops, compose files without a GPU, and tests. It answers as the official ``tensorflow_model_server`` does: the
same status codes and messages, typed response fields, version policies, labels and lifecycle states. What differs on
purpose stands in docs/tf_serving.md. Requests run in TensorFlow 1 sessions, as they do there, so that errors of the
graph come from the same place.
"""
