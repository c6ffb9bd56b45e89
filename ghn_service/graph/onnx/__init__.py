"""Reading architectures from ONNX: the only place of the service that touches ONNX."""
