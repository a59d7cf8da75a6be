"""What leaves dapt: ONNX, published checkpoints, model cards, the hub."""
