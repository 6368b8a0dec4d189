"""optimum's own export in float32, or beside it its own dynamic int8 quantization of that.

    python benchmarks/to_optimum.py CHECKPOINT OUT [--int8]

With --int8, OUT holds the float32 export already.
"""

import argparse
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--int8", action="store_true")
    options = parser.parse_args()
    if options.int8:
        quantize(options.out)
    else:
        export(options.checkpoint, options.out)


def export(checkpoint: Path, out: Path) -> None:
    from optimum.exporters.onnx import main_export

    partial = out.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    task = "text-generation-with-past"
    try:
        main_export(str(checkpoint), output=partial, task=task, dtype="fp32", device="cpu", do_validation=False)
    except RuntimeError:  # beyond 2 GB its search for weights that occur twice fails
        shutil.rmtree(partial)
        main_export(
            str(checkpoint),
            output=partial,
            task=task,
            dtype="fp32",
            device="cpu",
            do_validation=False,
            no_post_process=True,
        )
    partial.rename(out)


def quantize(directory: Path) -> None:
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    quantizer = ORTQuantizer.from_pretrained(directory, file_name="model.onnx")
    quantizer.quantize(
        AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False),
        save_dir=directory,
        use_external_data_format=True,
    )


if __name__ == "__main__":
    main()
