"""Bad input of `exporter verify`: one message and its exit code, through the command line."""

import json
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exporter import cli
from exporter.parity import memory, models
from exporter.parity.capture import capture
from exporter.parity.verify import verify
from tests.parity.conftest import Made, replace_tensors, update_manifest, write_adapter, write_base

Verify = Callable[..., tuple[int, str]]


@pytest.fixture
def command(made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verify:
    """`exporter verify` in this process: (exit code, what it said on stderr)."""

    def run(*extra: str | Path, bundle: Path = made.merged, base: Path = made.base) -> tuple[int, str]:
        arguments = ["verify", "--base", base, "--adapter", made.adapter, "--bundle", bundle, "--quiet", *extra]
        monkeypatch.setattr("sys.argv", ["exporter", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return int(ended.value.code or 0), said

    return run


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_prompts(content: str, command: Verify, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(content)
    code, said = command("--prompts", tmp_path / "prompts.jsonl")
    assert code == 4
    assert "holds no prompts" in said


def test_prompts_beyond_the_context_are_cut_and_said_so(made: Made, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in made.prompts.read_text().splitlines()[:12]]
    rows[0]["output"] = "word " * 400
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = verify(
        base=made.base, adapter=made.adapter, bundle=made.merged, prompts=tmp_path / "long.jsonl", level="release"
    )
    assert found.inputs.truncated >= 1
    assert any("were cut at the context of 256 tokens" in note for note in found.notes)


def test_texts_alone_are_judged_by_every_required_gate(made: Made, tmp_path: Path) -> None:
    """A gate that finds none of its tokens does not pass by saying nothing."""
    rows = [json.loads(line) for line in made.prompts.read_text().splitlines()]
    texts = [json.dumps({"text": row["instruction"] + " " + row["output"]}) + "\n" for row in rows]
    (tmp_path / "texts.jsonl").write_text("".join(texts))
    found = verify(base=made.base, adapter=made.adapter, bundle=made.merged, prompts=tmp_path / "texts.jsonl")
    assert found.verdict == "PASS", found.summary
    judged = {(gate.gate, gate.scope) for gate in found.bundles[0].gates if gate.outcome == "PASS"}
    for gate in ("liveness.gain", "reference.sanity", "reference.excess", "rounding.kl", "graph.kl"):
        assert (gate, "text") in judged


def test_tokenizers_that_differ(made: Made, command: Verify, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made.merged, tmp_path / "merged"))
    content = json.loads((directory / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (directory / "tokenizer.json").write_text(json.dumps(content))
    code, said = command(bundle=directory)
    assert code == 4
    assert "SHA-256" in said
    update_manifest(directory, "tokenizer.json")
    code, said = command("--prompts", made.prompts, bundle=directory)
    assert code == 4
    assert "tokenizer" in said


@pytest.mark.parametrize(("name", "part"), [("ln_f.weight", "head"), ("h.1.attn.c_attn.weight", "block 1")])
def test_nan_logits(name: str, part: str, made: Made, command: Verify, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(made.merged, tmp_path / "merged"))
    broken = load_file(directory / "model.safetensors")[f"transformer.{name}"].clone()
    broken.view(-1)[0] = float("nan")
    replace_tensors(directory, "model.safetensors", {f"transformer.{name}": broken})
    code, _ = command("--prompts", made.prompts, "--report", tmp_path / "report", bundle=directory)
    assert code == 1
    document = json.loads((tmp_path / "report" / "verification.json").read_text())
    assert document["verdict"] == "FAIL"
    assert document["bundles"][0]["origin"]["stage"] == "merge"
    assert document["bundles"][0]["origin"]["parts"] == [part]


def test_a_reference_of_other_tokens_or_of_another_model(made: Made, command: Verify, tmp_path: Path) -> None:
    plain = capture(base=made.base, adapter=made.adapter, out=tmp_path / "plain", prompts=made.prompts)
    code, said = command("--prompts", made.prompts, "--reference", plain.path)
    assert code == 4
    assert "other tokens" in said
    torch.manual_seed(3)
    write_adapter(tmp_path / "adapter", write_base(tmp_path / "base", seed=5))
    other = capture(
        base=tmp_path / "base", adapter=made.adapter, out=tmp_path / "other", prompts=made.prompts, template="alpaca"
    )
    code, said = command("--prompts", made.prompts, "--reference", other.path)
    assert code == 4
    assert "another base" in said
    code, said = command("--reference", tmp_path / "none")
    assert code == 4
    assert "no reference file" in said


def test_nothing_is_written_into_a_bundle(made: Made, command: Verify) -> None:
    for option in ("--report", "--scratch"):
        code, said = command("--prompts", made.prompts, option, made.merged / "inside")
        assert (code, option in said) == (2, True)
    assert not (made.merged / "inside").exists()


def test_missing_bitsandbytes(made: Made, command: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    real = models.version

    def absent(name: str) -> str:
        if name == "bitsandbytes":
            raise PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(models, "version", absent)
    code, said = command("--prompts", made.prompts)
    assert code == 5
    assert "exporter[int8]" in said


def test_not_enough_memory(made: Made, command: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda provider: 1000)
    code, said = command("--prompts", made.prompts)
    assert code == 5
    assert "memory" in said


def test_few_prompts_are_not_enough_evidence(command: Verify, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"instruction": "Say hello.", "output": "Hello."}\n')
    code, _ = command("--prompts", tmp_path / "few.jsonl")
    assert code == 3
