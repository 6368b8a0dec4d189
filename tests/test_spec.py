"""A spec is frozen types; an unknown key, a wrong type or a wrong value is an error that names it."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import InputRefused, UsageError
from exporter.pipeline import given, run
from exporter.spec import Spec, parse_size, read_spec

WHOLE = """
[base]
source = "owner/base"
revision = "main"
[adapter]
source = "owner/adapter"
[merge]
shard_size = "2GB"
[export]
precisions = ["native", "int8"]
[output]
dir = "out"
"""


def test_values_and_defaults(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(WHOLE)
    spec = read_spec(tmp_path / "run.toml")
    assert (spec.base.source, spec.base.revision) == ("owner/base", "main")
    assert [adapter.weight for adapter in spec.adapter] == [1.0]
    assert spec.merge.shard_size == 2_000_000_000
    assert (spec.export.precisions, spec.export.targets, spec.verify.level) == (("native", "int8"), ("cpu",), "commit")


def test_several_adapters(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        WHOLE.replace("[adapter]", "[[adapter]]") + '[[adapter]]\nsource = "owner/second"\nweight = 0.5\n'
    )
    assert [adapter.weight for adapter in read_spec(tmp_path / "run.toml").adapter] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("[merge]", "[merge]\nspeed = 3"), "merge.speed"),
        (('"int8"', '"int3"'), "export.precisions"),
        (('"2GB"', '"lots"'), "merge.shard_size"),
        (('[output]\ndir = "out"', ""), "output"),
        (("[base]", "[base"), "not TOML"),
        (("[export]", "[verify]\nlevel = 'casual'\n[export]"), "verify.level"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, change: tuple[str, str], named: str) -> None:
    assert change[0] in WHOLE
    (tmp_path / "run.toml").write_text(WHOLE.replace(*change))
    with pytest.raises(InputRefused, match=named):
        read_spec(tmp_path / "run.toml")


def test_a_missing_spec(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="no spec"):
        read_spec(tmp_path / "none.toml")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5MB", 1_500_000), ("512MiB", 1 << 29), (7, 7)])
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


def test_the_first_users_recipe_is_a_spec() -> None:
    spec = read_spec(Path(__file__).parents[1] / "recipes/gpt-6.7b-alpaca.toml")
    assert spec.base.source == "cerebras/Cerebras-GPT-6.7B"
    assert spec.export.precisions == ("native", "int8", "int4")


def keys(table: dict[str, Any]) -> set[str]:
    return {f"{name}.{key}" for name, values in table.items() for key in (values[0] if name == "adapter" else values)}


def test_the_documented_spec_names_every_key_with_its_default(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "docs/run.md").read_text()
    (tmp_path / "run.toml").write_text(text.partition("```toml\n")[2].partition("```")[0])
    spec = read_spec(tmp_path / "run.toml").model_dump()
    (adapter,) = spec["adapter"]
    plain = Spec.model_validate({"base": spec["base"], "adapter": adapter, "output": spec["output"]}).model_dump()
    assert spec.pop("prompt") == {"template": "alpaca"}
    assert spec["verify"].pop("prompts") == "prompts.jsonl"
    del plain["prompt"], plain["verify"]["prompts"]
    assert spec == plain
    written = tomllib.loads((tmp_path / "run.toml").read_text())
    assert keys(written) == keys(Spec.model_validate(written).model_dump())


def test_options_count_before_the_spec(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(WHOLE)
    same = read_spec(tmp_path / "run.toml")
    assert given(same) == same
    other = given(same, out="elsewhere", precision=("int4",), target=("cuda",), template="alpaca", level="release")
    assert (other.export.precisions, other.export.targets) == (("int4",), ("cuda",))
    assert (other.prompt.template, other.verify.level, other.output.dir) == ("alpaca", "release", "elsewhere")
    assert (other.base, other.adapter, other.merge) == (same.base, same.adapter, same.merge)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"level": "casual"}, "verify.level"),
        ({"precision": ["int9"]}, "export.precisions"),
        ({"target": ["tpu"]}, "export.targets"),
        ({"adapter": []}, "adapter: .*at least one"),
        ({"out": "a\0b"}, "output.dir"),
    ],
)
def test_what_is_wrong_among_the_keywords_is_named(tmp_path: Path, wrong: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        run(**({"base": "b", "adapter": "a", "out": tmp_path / "out"} | wrong))
    assert not (tmp_path / "out").exists()


def test_a_model_is_no_place_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="a model's own directory"):
        run(base="b", adapter="a", out=tmp_path)


def test_a_size_beyond_all_numbers_is_no_size() -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size("1e300TB")
