"""Prompts: chat templates as data, rendered in a sandbox exactly as transformers renders them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.errors import InputRefused
from exporter.json_text import parse_json
from exporter.templates import RenderError, render_apart, render_here

# The card's prompt. Every newline of the output stands in a string literal and every tag eats the white space around
# it, so the bytes do not depend on an engine's trim settings (Jinja drops a template's final newline; genai's engine
# is not Jinja). An answer ends in `<|endoftext|>`, as every answer of the adapter's training set did.
ALPACA = r"""
{%- for message in messages -%}
    {%- if message['content'] is not string -%}
        {{- raise_exception('The alpaca template takes the content of a message as one string.') -}}
    {%- endif -%}
    {%- if loop.index0 % 2 == 0 -%}
        {%- if message['role'] != 'user' -%}
            {{- raise_exception('The alpaca template takes user and assistant messages in turn, a user first.') -}}
        {%- endif -%}
        {%- if loop.first -%}
            {{- 'Below is an instruction that describes a task. ' -}}
            {{- 'Write a response that appropriately completes the request.\n' -}}
        {%- endif -%}
        {{- '\n\n### Instruction:\n\n' -}}
        {{- message['content'] -}}
        {{- '\n\n' -}}
        {%- if message['input'] -%}
            {{- '### Input:\n\n' -}}
            {{- message['input'] -}}
            {{- '\n\n' -}}
        {%- endif -%}
        {%- if not loop.last or add_generation_prompt -%}
            {{- '### Response:\n' -}}
        {%- endif -%}
    {%- else -%}
        {%- if message['role'] != 'assistant' -%}
            {{- raise_exception('The alpaca template takes user and assistant messages in turn, a user first.') -}}
        {%- endif -%}
        {%- if loop.last and add_generation_prompt -%}
            {{- raise_exception('The alpaca template answers a user: the last message must be a user message.') -}}
        {%- endif -%}
        {{- message['content'] -}}
        {{- '<|endoftext|>' -}}
    {%- endif -%}
{%- endfor -%}
""".strip()

TEMPLATES: Mapping[str, str] = {"alpaca": ALPACA}

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Tokenizers whose class has tokens of its own for files that name none, such as openai-community/gpt2 on the hub.
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_TOKENIZERS = ("GPT2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizer", "GPTNeoXTokenizerFast")
END_OF_TEXT_MODELS = ("gpt2", "gpt_neox")  # their AutoTokenizer, where tokenizer_config.json names no class


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
    today: str | None = None,
) -> str:
    """The text that `messages` become: the bytes of transformers' `apply_chat_template(tokenize=False)`.

    `special_tokens` are the names a template may use (`bos_token`, ...; see `special_tokens`). The text already holds
    every special token: encode it with `add_special_tokens=False`. InputRefused if the template is malformed, does
    something that the sandbox forbids, takes too much time or memory, or refuses the messages. `today` (ISO) is what a
    template is told that asks for the date; default: the clock's.
    """
    if not messages:
        raise InputRefused("the chat has no message", expected="at least one message with the role user")
    variables = {
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
        **(special_tokens or {}),
    }
    render = render_here if template in TEMPLATES.values() else render_apart
    try:
        return render(template, variables, today)
    except RenderError as error:
        raise InputRefused(
            f"the chat template refuses these messages: {error}",
            expected="messages that the template can render",
            todo='name another template in the spec\'s [prompt], such as "alpaca", or change the messages',
        ) from error


def takes_input(template: str, *, special_tokens: Mapping[str, str] | None = None, today: str | None = None) -> bool:
    """True if the template has a place for an input beside the instruction."""
    message = {"role": "user", "content": "instruction"}
    with_input, without = (
        render_chat(template, [one], special_tokens=special_tokens, today=today)
        for one in (message | {"input": "input"}, message)
    )
    return with_input != without


def render_instruction(
    template: str,
    instruction: str,
    input: str = "",
    *,
    special_tokens: Mapping[str, str] | None = None,
    today: str | None = None,
) -> str:
    """The prompt for one instruction and its optional input. InputRefused if the template would lose the input."""
    message = {"role": "user", "content": instruction}
    asked = message | {"input": input} if input else message
    text = render_chat(template, [asked], special_tokens=special_tokens, today=today)
    if input and text == render_chat(template, [message], special_tokens=special_tokens, today=today):
        raise InputRefused(
            "this chat template has no place for an input",
            expected="a template that reads the message's key `input`, as alpaca does",
            todo="put the input into the instruction",
        )
    return text


def chat_template(directory: Path) -> str | None:
    """The chat template of a model directory: `chat_template.jinja`, else the one in `tokenizer_config.json`.

    None if there is none: a template is never invented. Of several named ones the one named "default" counts.
    """
    own = directory / "chat_template.jinja"
    if own.is_file():
        return _read(own)
    value = _read_json(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):
        named = [one.get("template") for one in value if isinstance(one, dict) and one.get("name") == "default"]
        value = named[-1] if named else None
    if value is not None and not isinstance(value, str):
        raise InputRefused(f"{directory / 'tokenizer_config.json'}: chat_template is not text", expected="a string")
    return value


def special_tokens(directory: Path, model_type: str | None = None) -> dict[str, str]:
    """The special tokens of a model directory by name, as transformers hands them to a template.

    model_type: of the model where `directory` has no config.json, as an adapter's has not.
    """
    kind = model_type or _read_json(directory / "config.json").get("model_type")
    named = _read_json(directory / "tokenizer_config.json").get("tokenizer_class")
    is_gpt2s = named in END_OF_TEXT_TOKENIZERS or (named is None and kind in END_OF_TEXT_MODELS)
    found: dict[str, str] = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT) if is_gpt2s else {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        content = _read_json(directory / name)
        for key in [one for one in SPECIAL_TOKENS if one in content]:
            found.pop(key, None)  # null: the class's own does not count either
            value = content[key]
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[key] = text
    return found


def _read(path: Path) -> str:
    try:
        # Bytes first: text mode would turn \r\n into \n, and a template's bytes are its meaning.
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefused(f"{path} cannot be read: {error}", expected="a text file in UTF-8") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = parse_json(_read(path).encode())
    except ValueError as error:
        raise InputRefused(f"{path} is not JSON: {error}", expected="a JSON object") from error
    if not isinstance(content, dict):
        raise InputRefused(f"{path} holds a {type(content).__name__}", expected="a JSON object")
    return content
