"""What an LLM.int8 base means: the modules that 8-bit loading converts, their codes, and the weights of these codes.

Follows `AutoModelForCausalLM.from_pretrained(..., BitsAndBytesConfig(load_in_8bit=True), dtype=float16)` on a CPU,
element for element and without bitsandbytes. All functions are pure and take blocks of a stored tensor's rows.

Quantization (Dettmers et al., LLM.int8(), 2022, equation 4, one scale for each output), as bitsandbytes 0.50 computes
it in `Int8Params._quantize` (nn/modules.py) and `int8_vectorwise_quant` (backends/default/ops.py):

    W16 = float16(W),  absmax_o = max_i |W16[o, i]|,  C[o, i] = round_half_even(float32(W16[o, i]) * (127 / absmax_o))

where torch evaluates `127.0 / absmax` as reciprocal(absmax) * 127: two roundings in float32, which differ from the true
quotient for a quarter of all float16 values and change a code where the product is close to a tie.

Dequantization: float32(C[o, i] * absmax_o) * float32(1/127), of which only the last product rounds. bitsandbytes'
`int8_vectorwise_dequant` (_ops.py) is this on every device; PEFT's and transformers' `dequantize_bnb_weight` call it,
and through it PEFT's `Linear8bitLt.merge`: no last bit differs among them. C * (absmax / 127) would differ in a fifth
of the elements, and so may the 8-bit forward pass, which scales int32 sums of C by row scales / 127^2.

CUDA (`kInt8VectorQuant` in csrc/kernels.cu) also multiplies in float32 and rounds half to even (`__float2int_rn`), but
takes the scale from `__fdividef(127, absmax)`, an approximate quotient (up to 2 ulp), and is compiled with
--use_fast_math: a code may differ by one, and only where W16 * scale is within about 2^-15 of a tie. absmax is equal.
A row of zeros has the scale infinity and the products NaN on both; CUDA converts them to 0, as a CPU was seen to do
(C++ leaves it undefined). Here the code is 0 by definition; the weight is 0 whatever the code.
"""

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.pytorch_utils import Conv1D

from exporter.merging.changes import Orientation

RECIPROCAL = 7.874015718698502e-3  # float32(1/127), as bitsandbytes writes it
# transformers that convert a subclass of Linear (such as Falcon's); later ones take Linear itself alone
LINEAR_SUBCLASSES_BEFORE = Version("5.5.0")


def quantized_modules(model: transformers.PreTrainedModel) -> tuple[str, ...]:
    """Names of the modules that 8-bit loading converts, in the model's order: Linear and Conv1D, but for what is kept.

    model: the whole architecture, on the meta device or not; it is not changed. Kept are the output embeddings, tied
    weights, the module of the last parameter and `_keep_in_fp32_modules`: transformers' own
    `HfQuantizer.get_modules_to_not_convert` names them (quantizers/quantizer_bnb_8bit.py calls it so, in 4 and 5). How
    a kept name matches differs between the major versions, and this is the rule of the installed one.
    """
    from transformers.quantizers.base import HfQuantizer  # a second to import, and most merges need no codes

    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    matrices = [(name, module) for name, module in model.named_modules() if _is_matrix(module)]
    return tuple(name for name, _ in matrices if _is_converted(name, kept))


def _is_matrix(module: nn.Module) -> bool:
    if Version(transformers.__version__) < LINEAR_SUBCLASSES_BEFORE:
        return isinstance(module, nn.Linear | Conv1D)
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def _is_converted(name: str, kept: list[str]) -> bool:
    from transformers.quantizers import quantizers_utils

    rule = getattr(quantizers_utils, "should_convert_module", None)
    if rule is not None:  # transformers 5
        return rule(name, kept)
    # transformers 4: `_replace_with_bnb_linear` in integrations/bitsandbytes.py, which cannot run without bitsandbytes
    leaf = name.rpartition(".")[2]
    return leaf not in kept and not any(f"{key}." in name or key == name for key in kept)


def absmax_block(rows: torch.Tensor, orientation: Orientation, running: torch.Tensor | None = None) -> torch.Tensor:
    """The largest |float16(w)| of each output, in float32: bitsandbytes' SCB.

    rows (n, columns): a block of the stored tensor, any float type.
    "out_in" (Linear): returns (n,), final for these rows; `running` has no meaning.
    "in_out" (Conv1D): returns (columns,), the maximum of this block and of `running`, the result for the blocks before;
    final after the last block, so that a tensor is read once for this and once for its codes.
    NaN and values beyond float16's 65504 give NaN and infinity, which the caller refuses by the tensor's name.
    """
    magnitude = rows.to(torch.float16).abs()
    if orientation == "out_in":
        return magnitude.amax(dim=1).float()
    block = magnitude.amax(dim=0).float()
    return block if running is None else torch.maximum(running, block)


def codes(rows: torch.Tensor, absmax: torch.Tensor, orientation: Orientation) -> torch.Tensor:
    """int8 codes (n, columns) of a block of rows, laid out as it is stored: bitsandbytes' CB, or its transpose.

    rows (n, columns), any float type; absmax from `absmax_block`, float32: (n,) of these rows for "out_in", (columns,)
    of the whole tensor for "in_out". ValueError if an absmax is not finite: such a weight has no codes.
    """
    if not torch.isfinite(absmax).all():
        raise ValueError("an absmax is NaN or infinite: a weight is, or float16 cannot hold it")
    scale = torch.where(absmax > 0, 127.0 / absmax, 0.0)  # the very expression: see the module's docstring
    return torch.round(rows.to(torch.float16) * _along(scale, orientation)).to(torch.int8)


def dequantize(codes: torch.Tensor, absmax: torch.Tensor, orientation: Orientation) -> torch.Tensor:
    """float32 weights (n, columns) that the codes of a block stand for: code * absmax * 1/127, shapes as in `codes`."""
    return codes * _along(absmax, orientation) * RECIPROCAL


def _along(outputs: torch.Tensor, orientation: Orientation) -> torch.Tensor:
    """One value per output, shaped to multiply a stored block: outputs are rows of "out_in", columns of "in_out"."""
    return outputs[:, None] if orientation == "out_in" else outputs[None, :]
