"""ONNX graphs over weights that already lie on the disk."""

from exporter.graph.bundle import Bundle, bundles_in, dequantized_weights, open_bundle
from exporter.graph.export import export

__all__ = ["Bundle", "bundles_in", "dequantized_weights", "export", "open_bundle"]
