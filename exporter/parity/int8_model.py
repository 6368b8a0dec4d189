"""The 8-bit base loaded tensor by tensor: each becomes int8 before the next is read.

transformers' own loading maps whole files and holds both precisions of what it converts; here no more than one tensor
is in memory beside the int8 model. The modules are those that transformers' quantizer puts in, and the codes are
bitsandbytes' own: element for element what `from_pretrained` gives.
"""

from typing import Any, cast

import torch

from exporter.parity.bases import quiet
from exporter.parity.blocks import Unsupported, stored_names, without_weights
from exporter.parity.memory import OVERHEAD, require_memory
from exporter.sources.checkpoint import Checkpoint
from exporter.sources.values import read_tensor


def load_int8(base: Checkpoint, threshold: float) -> Any:
    """The base on the CPU with its linear layers in 8 bits and all else in float16, in eval mode.

    Unsupported where transformers keeps a part in float32, or where a weight is not stored under the model's own name.
    """
    from bitsandbytes.nn import modules
    from transformers import BitsAndBytesConfig
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.auto import AutoHfQuantizer

    Linear8bitLt, Int8Params = modules.Linear8bitLt, cast(Any, modules).Int8Params
    model = without_weights(base.directory, torch.float16)
    if getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        raise Unsupported("parts of it stay in float32")
    plain = {name: isinstance(module, Conv1D) for name, module in model.named_modules()}
    config = cast(Any, BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold))
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    with quiet():
        quantizer.preprocess_model(
            model=model, device_map={"": "cpu"}, keep_in_fp32_modules=None, dtype=torch.float16, config=model.config
        )
    model.tie_weights()
    weights = {id(one): one.numel() * (1 if isinstance(one, Int8Params) else 2) for one in model.parameters()}
    require_memory(sum(weights.values()) * OVERHEAD, "the 8-bit reference")
    first: dict[int, str] = {}
    for name, empty in [*model.named_parameters(remove_duplicate=False)]:
        if first.setdefault(id(empty), name) != name:
            continue
        path, _, leaf = name.rpartition(".")
        module = cast(Any, model.get_submodule(path))
        stored = next((n for n in stored_names(name, model.base_model_prefix) if n in base.tensors), None)
        if stored is None:
            raise Unsupported(f"no weight is stored as {name!r}")
        value = read_tensor(base.tensors[stored]).to(torch.float16)
        if isinstance(module, Linear8bitLt) and leaf == "weight":
            value = value.T if plain[path] else value  # (out, in)
            module._parameters[leaf] = Int8Params(value, requires_grad=False, has_fp16_weights=False).to("cpu")
        else:
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    quantizer.postprocess_model(model)
    return model.eval()
