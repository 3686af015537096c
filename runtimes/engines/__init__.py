"""What runs the methods of a model: PyTorch, ONNX Runtime, ExecuTorch, Core ML."""
