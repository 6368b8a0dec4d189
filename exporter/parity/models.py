"""The models a bundle is compared with, as transformers, PEFT and bitsandbytes run them; one at a time in memory."""

import gc
import logging
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.errors import EnvironmentLacking, InputRefused, lacking
from exporter.parity.attention import attention_of
from exporter.parity.bases import BaseOptions, load_base, quiet, resize
from exporter.parity.blocks import Unsupported
from exporter.parity.forward import forward
from exporter.parity.int8_model import load_int8
from exporter.parity.memory import OVERHEAD, require_memory
from exporter.sources.checkpoint import Checkpoint

OUTLIER_THRESHOLD = 6.0
Adapters = Sequence[tuple[Path, float]]


class TorchScorer:
    """A transformers model as a Scorer: batch 1, unpadded, no cache."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], /) -> NDArray[np.float32]:
        ids = torch.tensor([list(token_ids)], device=self.model.device)
        return forward(self.model, ids).logits[0].float().cpu().numpy()


class TruthModels:
    """T and M32 from one loaded fp32 model: unmerged, and merged by PEFT."""

    def __init__(self, base: Checkpoint, adapters: Adapters, options: BaseOptions = BaseOptions()) -> None:  # noqa: B008
        require_memory(parameter_count(base) * 4 * OVERHEAD, "the fp32 model that is the truth")
        self._model: Any = attach_adapters(load_base(base.directory, options), adapters)
        self._count = len(adapters)

    def truth(self) -> TorchScorer:
        """T: fp32, adapter unmerged."""
        return TorchScorer(self._model)

    def merged(self) -> TorchScorer:
        """M32: PEFT's own merge in fp32. The unmerged model is gone after this."""
        return TorchScorer(merge_adapters(self._model, self._count))


def base_scorer(base: Checkpoint, options: BaseOptions) -> TorchScorer:
    """B: the base that was merged onto, without the adapter. PEFT's switched-off adapter keeps trained biases on."""
    require_memory(parameter_count(base) * 4 * OVERHEAD, "the base in fp32")
    return TorchScorer(load_base(base.directory, options))


def merge_adapters(model: Any, count: int) -> Any:
    """PEFT's own merge of `count` adapters that `attach_adapters` put on; the unmerged model is gone after this."""
    _part_tied_weights(model)
    return model.merge_and_unload(adapter_names=_adapter_names(count)).eval()


def _adapter_names(count: int) -> list[str]:
    return [f"adapter{i}" for i in range(count)]


def _part_tied_weights(model: Any) -> None:
    """Give every adapted module a weight of its own: PEFT's merge into one of two tied modules reaches the other."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        base: Any = layer.get_base_layer()
        weight = base._parameters.get("weight")
        if weight is not None and len(owners[id(weight)]) > 1:
            owners[id(weight)].discard(id(base))
            base.weight = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            owners[id(base.weight)] = {id(base)}


def attach_adapters(model: Any, adapters: Adapters) -> Any:
    """PeftModel with every adapter loaded and active, each scaled by its weight; InputRefused if one does not fit."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    names = _adapter_names(len(adapters))
    try:
        with quiet():
            peft = PeftModel.from_pretrained(model, str(adapters[0][0]), adapter_name=names[0])
            for name, (directory, _) in zip(names[1:], adapters[1:], strict=True):
                peft.load_adapter(str(directory), adapter_name=name)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if system := lacking(error):
            raise system from error
        raise InputRefused(
            f"PEFT cannot put the adapter on this base: {str(error)[:300]}",
            expected="the base that the adapter was trained on",
        ) from error
    model = cast(Any, peft)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, (_, weight) in zip(names, adapters, strict=True):
                if name in layer.scaling:
                    layer.scaling[name] *= weight
    if len(names) > 1:
        model.base_model.set_adapter(names)
    return model.eval()


def load_reference(base: Checkpoint, adapters: Adapters, rows: int | None = None) -> Any:
    """R: bitsandbytes LLM.int8 with the adapter unmerged, as the adapter's card loads it. rows: of a new vocabulary.

    threshold 6.0, fp16, one device, eval mode (the train-mode path differs by 0.03). EnvironmentLacking without
    bitsandbytes or memory; InputRefused for an adapter that 8-bit layers cannot run.
    """
    try:
        version("bitsandbytes")
    except PackageNotFoundError as error:
        raise EnvironmentLacking(
            "bitsandbytes is not installed, and the reference is the 8-bit model",
            expected="the extra int8",
            todo='pip install "exporter[int8]", or give --reference FILE from `exporter capture`',
        ) from error
    model = _load_8_bit(base)
    with quiet():
        resize(model, rows)
        adapted = attach_adapters(model, adapters)
    _mend_8_bit_layers(adapted)
    _try_one_token(adapted)
    return adapted


def _load_8_bit(base: Checkpoint) -> Any:
    """As `from_pretrained(load_in_8bit=True)` loads it; on a CPU tensor by tensor where that is possible."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        try:
            return load_int8(base, OUTLIER_THRESHOLD)
        except Unsupported:
            # Measured: a 6.7B model (13.3 GB in fp16) peaks at 19.9 GB while its layers become int8.
            require_memory(parameter_count(base) * 2 * 1.5, "the 8-bit reference")
    quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=OUTLIER_THRESHOLD)
    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            base.directory,
            quantization_config=quantization,
            dtype=torch.float16,
            device_map={"": device},
            attn_implementation=attention_of(base.directory),
            trust_remote_code=False,
            local_files_only=True,
        )


def _mend_8_bit_layers(model: Any) -> None:
    """Two faults of PEFT with bitsandbytes that stop a forward pass; no arithmetic is changed.

    IA3 gives float32 for the float16 that it was given: its result is cast back, as PEFT's LoRA layer does. DoRA copies
    the codes at each pass on a CPU, and bitsandbytes takes the copy for new codes without scales: it keeps the old.
    """
    from bitsandbytes.nn.modules import Linear8bitLt
    from peft.tuners.tuners_utils import BaseTunerLayer

    def cast_back(_: Any, given: tuple[Any, ...], result: Any) -> Any:
        return result.to(given[0].dtype) if given[0].is_floating_point() else result

    def keep_scales(layer: Any, _: Any) -> None:
        if layer.weight.CB is not None and layer.weight.SCB is None and layer.state.SCB is not None:
            layer.weight.CB = None

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at each layer what it casts
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(keep_scales)
        elif isinstance(module, BaseTunerLayer):
            cast(torch.nn.Module, module).register_forward_hook(cast_back)


def _try_one_token(model: Any) -> None:
    """InputRefused where the model cannot run, twice: PEFT and bitsandbytes do not fit together for every method."""
    try:
        for _ in range(2):
            TorchScorer(model).logits([0])
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise InputRefused(
            f"the 8-bit reference cannot run this adapter: {type(error).__name__}: {str(error)[:300]}",
            expected="an adapter that PEFT runs on bitsandbytes' 8-bit layers",
            todo="give --reference FILE, captured where it runs",
        ) from error


def reference_environment() -> dict[str, str]:
    """Where the reference is run: CPU and GPU paths of LLM.int8 differ."""
    device = (
        torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    )
    found = {name: _version(name) for name in ("bitsandbytes", "torch", "transformers", "peft")}
    settings = {"dtype": "float16", "threshold": str(OUTLIER_THRESHOLD), "batch": "1, unpadded"}
    return {"device": device, "machine": platform.machine(), **found, **settings}


def load_weights(directory: Path, values: Mapping[str, torch.Tensor]) -> TorchScorer:
    """F: the architecture of `directory`'s config.json in fp32 over given weights; InputRefused if one is missing."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    require_memory(sum(value.nbytes for value in values.values()), "the fp32 model over the bundle's weights")
    with quiet():
        architecture = cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
        model, info = architecture.from_pretrained(
            None,
            config=config,
            state_dict=dict(values),
            dtype=torch.float32,
            attn_implementation=attention_of(directory),
            output_loading_info=True,
        )
    if info["missing_keys"]:
        raise InputRefused(
            f"{len(info['missing_keys'])} weights are missing, such as {sorted(info['missing_keys'])[0]!r}",
            expected="every parameter of the architecture in config.json",
        )
    return TorchScorer(model.eval())


@contextmanager
def older_objects_set_aside() -> Iterator[None]:
    """`release` looks only at what came after this: over all that torch and transformers hold it takes 0.3 s."""
    ours = gc.get_freeze_count() == 0  # a caller's own stay aside
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def release() -> None:
    """Return a dropped model's memory before the next one is loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def parameter_count(base: Checkpoint) -> int:
    """How many numbers the base holds."""
    total = 0
    for info in base.tensors.values():
        count = 1
        for size in info.shape:
            count *= size
        total += count
    return total


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
