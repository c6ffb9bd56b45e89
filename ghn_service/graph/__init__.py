"""Architectures as graphs: the value itself, and how it is read from ONNX files (``graph.onnx.reader``)."""
