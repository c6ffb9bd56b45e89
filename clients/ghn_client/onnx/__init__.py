"""Everything of the client that touches ONNX: modules and files in, filled and trainable networks out."""
