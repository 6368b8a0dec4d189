"""The base as the references and the oracle use it: without weights, or in fp32, on its int8 codes if that is asked."""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exporter.merging.modules import BUILD_ERRORS, cannot_build
from exporter.parity.attention import attention_of
from exporter.parity.int8_base import Onto, int8_modules, put_int8_values
from exporter.sources.adapter import Adapter
from exporter.sources.checkpoint import Checkpoint

# What PEFT puts into the names of tensors that it saves whole: `wte.modules_to_save.weight`, `wte.base_layer.weight`.
WRAPPERS = re.compile(r"\.(modules_to_save|base_layer|original_module)(?=\.)")


@dataclass(frozen=True, slots=True)
class BaseOptions:
    """onto: the base's own weights, or what its int8 codes mean. rows: the vocabulary where the adapter resized it."""

    onto: Onto = "original"
    rows: int | None = None


def meta_model(directory: Path) -> Any:
    """The base's architecture without weights. Code in the directory is never run. InputRefused if there is none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except BUILD_ERRORS as error:
        raise cannot_build(directory, error) from error


def load_base(directory: Path, options: BaseOptions = BaseOptions()) -> Any:
    """The base in fp32, as `options` say. Code in the directory is never run."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation=attention_of(directory),
            trust_remote_code=False,
            local_files_only=True,
        ).eval()
        if options.onto == "int8":
            put_int8_values(model, int8_modules(meta_model(directory)))
        resize(model, options.rows)
    return model


def resize(model: Any, rows: int | None) -> None:
    """Give the embeddings `rows` rows, as the adapter's user did before training; new rows are zero until it is on."""
    if rows is None:
        return
    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows, mean_resizing=False)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        if embedding is not None:
            embedding.weight.data[before:] = 0


def resized_rows(base: Checkpoint, adapters: Sequence[Adapter]) -> int | None:
    """Rows of the embeddings that an adapter saved whole, where they are not the base's."""
    model = meta_model(base.directory)
    sizes = {}
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        names = [name for name, module in model.named_modules() if module is embedding]
        sizes |= {f"{name}.weight": embedding.weight.shape[0] for name in names}
    for adapter in adapters:
        for name, info in adapter.tensors.items():
            plain = WRAPPERS.sub("", name)
            if plain in sizes and len(info.shape) == 2 and info.shape[0] != sizes[plain]:
                return info.shape[0]
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of libraries: what is wrong is checked and said by us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
