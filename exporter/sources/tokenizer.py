"""One complete set of tokenizer files from one source, and the `tokenizer.json` that files of 2023 lack."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from exporter.errors import InputRefused
from exporter.sources.checkpoint import read_json

TOKENIZER_JSON = "tokenizer.json"
# Any one of these makes a set complete: it holds the vocabulary and the rules.
VOCABULARIES = (
    (TOKENIZER_JSON,),
    ("vocab.json", "merges.txt"),
    ("tokenizer.model",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("vocab.txt",),
)
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """`files` belong together and are copied byte for byte; `has_fast` says whether tokenizer.json is among them."""

    directory: Path
    origin: Literal["adapter", "base"]
    files: tuple[Path, ...]

    @property
    def has_fast(self) -> bool:
        return any(file.name == TOKENIZER_JSON for file in self.files)


def tokenizer_files(base_dir: Path, adapter_dirs: Sequence[Path]) -> TokenizerSource:
    """The tokenizer that the merged model gets: the first adapter's that is complete, else the base's.

    Sets are never mixed: an adapter's tokenizer_config.json beside the base's vocabulary could name tokens that the
    vocabulary lacks. InputRefused if no source has a complete set.
    """
    for directory in adapter_dirs:
        if files := _complete_set(directory):
            return TokenizerSource(directory, "adapter", files)
    if files := _complete_set(base_dir):
        return TokenizerSource(base_dir, "base", files)
    places = ", ".join(str(directory) for directory in (*adapter_dirs, base_dir))
    raise InputRefused(
        f"no tokenizer in {places}",
        expected="tokenizer.json, vocab.json with merges.txt, or a sentencepiece model",
        todo="copy the base's tokenizer files into its directory",
    )


def _complete_set(directory: Path) -> tuple[Path, ...]:
    names = [name for group in VOCABULARIES if all((directory / name).is_file() for name in group) for name in group]
    if not names:
        return ()
    return tuple(directory / name for name in (*names, *COMPANIONS) if (directory / name).is_file())


def build_tokenizer_json(directory: Path) -> bytes:
    """`tokenizer.json` for a GPT-2 tokenizer that has only vocab.json and merges.txt.

    The bytes that transformers' `GPT2TokenizerFast` makes of these files; onnxruntime-genai and the Runner read only
    this form. The class is fixed, so no code that the files name is run. InputRefused if the files are malformed or
    name another tokenizer class.
    """
    config_path = directory / "tokenizer_config.json"
    name = read_json(config_path).get("tokenizer_class") if config_path.is_file() else None
    if name not in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
        raise InputRefused(
            f"{directory} has no {TOKENIZER_JSON}, and its tokenizer_class is {name!r}",
            expected=f"{TOKENIZER_JSON}, or GPT2Tokenizer with vocab.json and merges.txt",
            todo=f"load it with transformers' AutoTokenizer and save it: save_pretrained writes {TOKENIZER_JSON}",
        )
    read_json(directory / "vocab.json")
    from transformers import GPT2TokenizerFast  # seconds to import, and most tokenizers need no conversion

    try:
        return GPT2TokenizerFast.from_pretrained(directory).backend_tokenizer.to_str().encode()
    except Exception as error:  # tokenizers (Rust) raises plain Exception, for a merge of unknown tokens among others
        raise InputRefused(
            f"the tokenizer files in {directory} cannot be read: {error}",
            expected="vocab.json and merges.txt of one GPT-2 tokenizer",
            todo="fetch them again",
        ) from error
