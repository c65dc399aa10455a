"""A compressed network on disk: the artifact, ONNX, and loading them again."""
