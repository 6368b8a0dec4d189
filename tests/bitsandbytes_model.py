"""Models as `load_in_8bit=True` makes them: bitsandbytes' own codes and scales."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: there is no oracle")


def load_in_8_bits(directory: Path, auto: Any = AutoModelForCausalLM) -> Any:
    """On the CPU. auto: transformers' class to load with."""
    return auto.from_pretrained(
        directory,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.float16,
        device_map={"": "cpu"},
        local_files_only=True,
    )


def int8_layers(model: Any) -> dict[str, Any]:
    """The modules that were converted, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}
