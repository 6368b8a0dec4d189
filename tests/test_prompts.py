"""The card's bytes, in transformers' engine, in genai's and in ours."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from exporter.errors import InputRefused
from exporter.prompts import ALPACA, TEMPLATES, chat_template, render_chat, render_instruction, special_tokens

INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
# What a user may type: nothing in it is markup, and no white space of it may be lost.
TEXTS = [
    "Name a river.",
    "  two\n\nparagraphs \n",
    "{{ 7 * 7 }} {% raw %} {# #}",
    "schön 漢字 🙂",
    "a\\nb 'c' \"d\" <b>&amp;",
]


def card(instruction: str, input: str = "") -> str:
    """The adapter card's prompt, written here by hand."""
    block = f"### Input:\n\n{input}\n\n" if input else ""
    return f"{INTRODUCTION}\n\n\n### Instruction:\n\n{instruction}\n\n{block}### Response:\n"


def user(content: str, input: str = "") -> dict[str, str]:
    return {"role": "user", "content": content} | ({"input": input} if input else {})


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


CHATS = [
    [user("Name a river.")],
    [user("Add these.", "1, 2")],
    [user("Name a river."), assistant("The Rhine."), user("Another.", "not in Europe")],
    [user("a"), assistant("b"), user("c", "d"), assistant("e "), user("f")],
]


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<|endoftext|>": 256}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


@pytest.fixture(scope="module")
def genai_tokenizer(byte_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory):
    genai = pytest.importorskip("onnxruntime_genai")
    directory = tmp_path_factory.mktemp("genai")
    byte_tokenizer.save_pretrained(directory)
    # genai knows the tokenizer classes of transformers 4; transformers 5 writes a name of its own.
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_bytes(ALPACA.encode())
    names = {"past_key_names": "k.%d", "past_value_names": "v.%d"}
    model = {"type": "decoder", "vocab_size": 257, "context_length": 64, "decoder": {"filename": "x", "inputs": names}}
    model |= {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 256}
    (directory / "genai_config.json").write_text(json.dumps({"model": model, "search": {"max_length": 64}}))
    return genai.Tokenizer(genai.Config(str(directory)))


@pytest.mark.parametrize("input", ["", "1, 2\n\n3", "{{ x }}"])
@pytest.mark.parametrize("instruction", TEXTS)
def test_alpaca_is_the_cards_prompt(instruction: str, input: str, byte_tokenizer, genai_tokenizer) -> None:
    expected = card(instruction, input)
    message = user(instruction, input)
    assert render_instruction(ALPACA, instruction, input) == expected
    assert (
        byte_tokenizer.apply_chat_template([message], chat_template=ALPACA, add_generation_prompt=True, tokenize=False)
        == expected
    )
    assert genai_tokenizer.apply_chat_template(json.dumps([message]), add_generation_prompt=True) == expected


def test_alpaca_ends_in_one_newline_after_response() -> None:
    assert render_instruction(TEMPLATES["alpaca"], "x").endswith("\n\n### Response:\n")
    assert not render_instruction(ALPACA, "x").endswith("\n\n")


def test_earlier_turns_end_in_the_end_of_text_token() -> None:
    text = render_chat(ALPACA, CHATS[2])
    assert text == card("Name a river.") + "The Rhine.<|endoftext|>" + "\n\n### Instruction:\n\nAnother.\n\n" + (
        "### Input:\n\nnot in Europe\n\n### Response:\n"
    )


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("generation", [True, False])
def test_every_engine_renders_the_same_chat(messages, generation: bool, byte_tokenizer, genai_tokenizer) -> None:
    ours = render_chat(ALPACA, messages, add_generation_prompt=generation)
    theirs = byte_tokenizer.apply_chat_template(
        messages, chat_template=ALPACA, add_generation_prompt=generation, tokenize=False
    )
    assert ours == theirs
    genai = genai_tokenizer.apply_chat_template(
        json.dumps(messages), template_str=ALPACA, add_generation_prompt=generation
    )
    assert ours == genai


def test_a_finished_chat_is_what_the_model_would_have_said() -> None:
    chat = [user("a"), assistant("b")]
    assert render_chat(ALPACA, chat, add_generation_prompt=False) == card("a") + "b<|endoftext|>"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "be brief"}, user("a")],
        [user("a"), {"role": "tool", "content": "b"}],
        [user("a"), user("b")],
        [assistant("a")],
        [user("a"), assistant("b")],
        [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        [{"role": "user"}],
        [],
    ],
)
def test_alpaca_refuses_other_roles_and_orders(messages, genai_tokenizer) -> None:
    with pytest.raises(InputRefused):
        render_chat(ALPACA, messages)
    if messages:
        with pytest.raises(RuntimeError):
            genai_tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)


@pytest.mark.parametrize(
    "template",
    [
        # trim_blocks and lstrip_blocks, a final newline, special tokens, loop controls, tojson, generation marks
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n  {{ m.content }}\n    {% endif %}\n{% endfor %}\n",
        "{{ bos_token }}{% for m in messages %}{{ m['role'] + m['content'] | trim }}\n{{ eos_token }}{% endfor %}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}\n\n",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{%- set ns = namespace(n=0) -%}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
@pytest.mark.parametrize("messages", CHATS)
def test_other_templates_render_as_in_transformers(template: str, messages, byte_tokenizer) -> None:
    ours = render_chat(template, messages, special_tokens=byte_tokenizer.special_tokens_map)
    theirs = byte_tokenizer.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert ours == theirs


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{% for x in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{% if %}",
    ],
)
def test_a_hostile_or_broken_template_is_refused(template: str) -> None:
    with pytest.raises(InputRefused):
        render_chat(template, [user("a")])


def test_an_input_is_never_lost_silently() -> None:
    with pytest.raises(InputRefused, match="no place for an input"):
        render_instruction("{{ messages[0].content }}", "add", "1 2")


def test_chat_template_prefers_its_own_file(tmp_path: Path) -> None:
    assert chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "from the config"}))
    assert chat_template(tmp_path) == "from the config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert chat_template(tmp_path) == "the default"
    (tmp_path / "chat_template.jinja").write_bytes(b"from the file\r\n")
    assert chat_template(tmp_path) == "from the file\r\n"


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"chat_template": 3}', b"\xff"])
def test_a_malformed_tokenizer_config_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(InputRefused, match="tokenizer_config"):
        chat_template(tmp_path)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize(
    "config", [{"model_max_length": 1024}, {"eos_token": "a"}, {"tokenizer_class": "PreTrainedTokenizerFast"}]
)
def test_special_tokens_that_no_file_names_are_those_of_the_class(
    byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, model_type: str, config: dict[str, Any]
) -> None:
    """openai-community/gpt2 names none."""
    byte_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    expected = {
        key: str(value)
        for key, value in AutoTokenizer.from_pretrained(tmp_path).special_tokens_map.items()
        if model_type != "llama" or key in config  # a Llama's own are <s> and </s>: not known here
    }
    assert special_tokens(tmp_path) == expected
    (tmp_path / "config.json").unlink()
    assert special_tokens(tmp_path, model_type) == expected


def test_special_tokens_are_transformers_own(byte_tokenizer, tmp_path: Path) -> None:
    byte_tokenizer.save_pretrained(tmp_path)
    assert special_tokens(tmp_path) == {k: str(v) for k, v in byte_tokenizer.special_tokens_map.items()}
