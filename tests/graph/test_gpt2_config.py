"""Every field of transformers' GPT2Config, of 4.57 and of 5: honoured, refused by name, or shown to compute nothing."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GPT2Config

from exporter.errors import InputRefused
from exporter.graph.export import export
from tests.graph.calls import Graph, one_row
from tests.graph.conftest import TinyModel, tiny_model, tokens
from tests.graph.test_gpt2_graph import OPTIONS

# Each is read by read_gpt2 and held to transformers' logits in test_gpt2_graph (OPTIONS, and its random shapes).
HONOURED = {
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "layer_norm_epsilon",
    "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "tie_word_embeddings",
    "model_type",
}  # fmt: skip
# Values that would make another model of it; a file may hold the last two though no class of either version sets them.
REFUSED: dict[str, Any] = {
    "add_cross_attention": True,
    "pruned_heads": {"0": [1]},
    "is_causal": False,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}
# Of training, or of heads other than the language model's: set to something odd, transformers' logits stay the same.
WITHOUT_EFFECT: dict[str, Any] = {
    "resid_pdrop": 0.9,
    "embd_pdrop": 0.9,
    "attn_pdrop": 0.9,
    "initializer_range": 7.0,
    "summary_type": "mean",
    "summary_use_proj": False,
    "summary_activation": "tanh",
    "summary_first_dropout": 0.9,
    "summary_proj_to_labels": False,
    "use_cache": False,
    "is_decoder": True,
    "cross_attention_hidden_size": 7,
    "chunk_size_feed_forward": 3,
    "tie_encoder_decoder": True,
    "use_bfloat16": True,
    "problem_type": "regression",
    "return_dict_in_generate": True,
}
# Labels, tokens and how text is generated, what is returned, and where it came from: nothing of a forward pass.
ABOUT_THE_FILE = {
    "_name_or_path", "architectures", "dtype", "transformers_version", "tokenizer_class", "finetuning_task",
    "task_specific_params", "id2label", "label2id", "prefix", "tf_legacy_loss", "is_encoder_decoder", "return_dict",
    "torchscript", "output_attentions", "output_hidden_states", "output_scores",
    "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "bad_words_ids",
    "begin_suppress_tokens", "suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "diversity_penalty",
    "do_sample", "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "length_penalty",
    "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "remove_invalid_values", "repetition_penalty", "temperature", "top_k", "top_p", "typical_p",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(tmp_path_factory.mktemp("plain"))


def change(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_no_field_of_the_installed_version_is_forgotten() -> None:
    fields = set(GPT2Config().to_dict()) | set(inspect.signature(GPT2Config.__init__).parameters)
    unknown = fields - HONOURED - REFUSED.keys() - WITHOUT_EFFECT.keys() - ABOUT_THE_FILE - {"self", "kwargs"}
    assert not unknown, "a new field: honour it, refuse it by name, or show that it changes nothing"


def test_every_honoured_field_is_changed_by_a_test_against_transformers() -> None:
    changed = {key for options in OPTIONS.values() for key in options}
    assert HONOURED - changed <= {"n_positions", "model_type"}  # two that other tests of that file change


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused_by_name(tmp_path: Path, name: str) -> None:
    tiny_model(tmp_path)
    change(tmp_path, **{name: REFUSED[name]})
    with pytest.raises(InputRefused, match=name):
        export(tmp_path)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_field_without_effect_has_none_here_or_there(tmp_path: Path, model: TinyModel, name: str) -> None:
    from transformers import GPT2LMHeadModel

    ids = tokens(20)
    model.model.save_pretrained(tmp_path)
    change(tmp_path, **{name: WITHOUT_EFFECT[name]})
    changed = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    np.testing.assert_array_equal(TinyModel(tmp_path, changed).logits(ids), model.logits(ids))
    logits = Graph(export(tmp_path)[0].graph)(*one_row(ids))[0][0]
    np.testing.assert_allclose(logits, model.logits(ids), atol=1e-4, rtol=0)
