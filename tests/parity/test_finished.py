"""A run of several bundles that is interrupted goes on with the one it was at."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exporter.parity import verify as module
from exporter.parity.bundle_check import Run, verify_bundle
from exporter.parity.bundles import Bundle
from exporter.parity.finished import Finished
from exporter.parity.result import BundleResult, Verification
from tests.parity.conftest import Made, open_bundle

FACTS = {"level": "commit", "memory": "auto", "reference": "int8"}


class Interrupted:
    """`verify_bundle`, counted, and stopped before its bundle number `stop`."""

    def __init__(self, stop: int) -> None:
        self.stop, self.asked = stop, list[str]()

    def __call__(self, run: Run, bundle: Bundle) -> BundleResult:
        if len(self.asked) == self.stop:
            raise KeyboardInterrupt
        self.asked.append(bundle.directory.name)
        return verify_bundle(run, bundle)


@pytest.fixture(scope="module")
def interrupted(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The arguments of a run over two bundles that was stopped at the second, and its scratch directory."""
    scratch = tmp_path_factory.mktemp("interrupted") / "scratch"
    asked = {"base": made.base, "adapter": made.adapter, "bundle": [made.merged, made.int8], "prompts": made.prompts}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "verify_bundle", Interrupted(1))
        with pytest.raises(KeyboardInterrupt):
            module.verify(**asked, scratch=scratch)
    return asked, scratch


def resumed(asked: dict[str, Any], scratch: Path) -> tuple[Verification, list[str]]:
    counted = Interrupted(9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "verify_bundle", counted)
        return module.verify(**asked, scratch=scratch), counted.asked


def test_only_what_was_not_finished_is_verified_again(interrupted: tuple[dict[str, Any], Path], made: Made) -> None:
    asked, scratch = interrupted
    (kept,) = scratch.glob("*/result-*.json")
    assert kept.is_file()
    found, done = resumed(asked, scratch)
    assert done == [made.int8.name]
    assert not scratch.exists()
    whole = module.verify(**asked)
    assert found.bundles == whole.bundles
    assert found.verdict == whole.verdict


def a_result() -> BundleResult:
    return BundleResult(
        directory="elsewhere",
        format="float",
        target="cpu",
        provenance="known",
        files={"model.onnx": "1"},
        verdict="PASS",
        correctness="PASS",
        quality=None,
        gates=(),
        projections=(),
        stages=(),
        mutants=(),
        cache=(),
        histograms=(),
        by_position=(),
        worst=(),
        notes=("said",),
    )


def test_a_result_is_read_as_it_was_written(made: Made, tmp_path: Path) -> None:
    bundle, finished = open_bundle(made.merged), Finished(tmp_path, FACTS)
    assert finished.read(bundle) is None
    finished.write(bundle, a_result())
    assert finished.read(bundle) == replace(a_result(), directory=str(made.merged))


@pytest.mark.parametrize("key", FACTS)
def test_another_run_does_not_take_it(made: Made, tmp_path: Path, key: str) -> None:
    bundle = open_bundle(made.merged)
    Finished(tmp_path, FACTS).write(bundle, a_result())
    assert Finished(tmp_path, FACTS | {key: "another"}).read(bundle) is None


@pytest.mark.parametrize("change", [{"provenance": "unknown"}, {"hashes": {"model.onnx": "2"}}, {"merge_dtype": "F32"}])
def test_another_bundle_does_not_take_it(made: Made, tmp_path: Path, change: dict[str, Any]) -> None:
    bundle, finished = open_bundle(made.merged), Finished(tmp_path, FACTS)
    finished.write(bundle, a_result())
    assert finished.read(replace(bundle, **change)) is None


def test_another_state_of_the_code_does_not_take_it(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, finished = open_bundle(made.merged), Finished(tmp_path, FACTS)
    finished.write(bundle, a_result())
    monkeypatch.setattr("exporter.parity.finished.code_digest", lambda: "another")
    assert finished.read(bundle) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"verdict": "PASS"}', b"\xff", b"[" * 100_000])
def test_what_is_no_result_is_not_taken_for_one(made: Made, tmp_path: Path, content: bytes) -> None:
    bundle, finished = open_bundle(made.merged), Finished(tmp_path, FACTS)
    finished.path(bundle).write_bytes(content)
    assert finished.read(bundle) is None
