"""ONNX graphs over weights that already lie on the disk: `export.export` writes bundles, `bundle` opens them."""
