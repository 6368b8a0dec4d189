"""The base that an LLM.int8 reference stands on: which weights 8-bit loading converts, and what their codes mean.

bitsandbytes and transformers' own quantizer say both where bitsandbytes is installed, so that the check does not share
the merge stage's code. Without it, `exporter.merging.int8` stands in: it is tested against them element for element.
"""

import importlib.util
from typing import Any, Literal, cast

import torch

from exporter.errors import InputRefused
from exporter.merging import int8

Onto = Literal["original", "int8"]


def int8_modules(model: Any) -> dict[str, bool]:
    """Modules that 8-bit loading converts, by name, and whether their weight is stored (in, out), as Conv1D's is.

    model: the architecture on the meta device; with bitsandbytes it is used up.
    """
    from transformers.pytorch_utils import Conv1D

    transposed = {name: isinstance(module, Conv1D) for name, module in model.named_modules()}
    if not has_bitsandbytes():
        return {name: transposed[name] for name in int8.quantized_modules(model)}
    from bitsandbytes.nn.modules import Linear8bitLt
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    config = cast(Any, BitsAndBytesConfig(load_in_8bit=True))
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    kept = getattr(model, "_keep_in_fp32_modules", None)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"}, keep_in_fp32_modules=kept, dtype=torch.float16)
    return {name: transposed[name] for name, module in model.named_modules() if isinstance(module, Linear8bitLt)}


def int8_values(weight: torch.Tensor, *, transposed: bool, name: str) -> torch.Tensor:
    """float32 values of the int8 codes of `weight`, in its own orientation. weight: any float type.

    InputRefused, by `name`, where float16 cannot hold a value: such a weight has no codes.
    """
    half = weight.to(torch.float16)
    if not torch.isfinite(half).all():
        raise InputRefused(f"{name!r} has no int8 codes: float16 cannot hold a value of it")
    if not has_bitsandbytes():
        absmax = int8.absmax_block(half, "in_out" if transposed else "out_in")
        codes = int8.codes(half, absmax, "in_out" if transposed else "out_in")
        return int8.dequantize(codes, absmax, "in_out" if transposed else "out_in")
    from bitsandbytes import functional

    rows = half.T.contiguous() if transposed else half.contiguous()  # (out, in): one scale for each output
    codes, scales, _ = functional.int8_vectorwise_quant(rows)
    values = functional.int8_vectorwise_dequant(codes, scales)
    return values.T.contiguous() if transposed else values


def put_int8_values(model: Any, modules: dict[str, bool]) -> None:
    """Replace the weights of `modules` in a loaded model by what their int8 codes mean."""
    for name, transposed in modules.items():
        weight = model.get_submodule(name).weight
        weight.data = int8_values(weight.data, transposed=transposed, name=name).to(weight.dtype)


def has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None
