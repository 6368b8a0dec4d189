"""python benchmarks/to_ctranslate2.py CHECKPOINT OUT float32|int8 SITE_PACKAGES_WITH_CTRANSLATE2

CTranslate2's converter needs transformers and torch: it runs here, and is found in the peers' environment.
"""

import json
import shutil
import sys
from pathlib import Path


def main(checkpoint: str, out: str, kind: str, site_packages: str) -> None:
    sys.path.append(site_packages)  # behind our own
    from ctranslate2.converters import TransformersConverter  # pyright: ignore[reportMissingImports]

    partial = Path(f"{out}.partial")
    TransformersConverter(checkpoint).convert(str(partial), quantization=kind, force=True)
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    shape = {name: config[name] for name in ("n_positions", "n_embd", "n_layer")}
    (partial / "shape.json").write_text(json.dumps(shape))  # what our worker cannot ask CTranslate2
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


if __name__ == "__main__":
    main(*sys.argv[1:5])
