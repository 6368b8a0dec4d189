"""`make bench-serve` and `make soak` on something tiny: figures are a client's, and the soak finds what is wrong."""

import asyncio
import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(HERE))

import bench_serve  # noqa: E402
import soak  # noqa: E402
import soak_clients  # noqa: E402
from decode_models import PEERS  # noqa: E402
from serve_load import Answer, Load  # noqa: E402
from serve_servers import SERVER_PEERS, SERVERS  # noqa: E402
from soak_cases import CHAT, COMPLETIONS  # noqa: E402

from tests.graph.conftest import save_byte_tokenizer, tiny_model  # noqa: E402
from tests.serving.running import Running, running  # noqa: E402


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoint of a tiny size in its place, and no environment of peers."""
    directory = tmp_path_factory.mktemp("bench")
    base = directory / "decode/tiny/base"
    base.mkdir(parents=True)
    tiny_model(base, n_positions=512)
    save_byte_tokenizer(base)
    return directory


def test_a_run_measures_ours_and_says_why_the_peers_are_missing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_serve, "make_peers", lambda *_: {"llama-cpp-python": "no compiler"})
    words = ["bench_serve.py", "--sizes", "tiny", "--contenders", "exporter-int8-block128", "llama", "--rounds", "1"]
    words += ["--streams", "1", "3", "--requests", "1", "--new-tokens", "8", "--threads", "1", "--work", str(work)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setenv("PATH", "/nowhere")
    bench_serve.main()
    report = json.loads((work / "serve.json").read_text())
    (found,) = report["sizes"]
    assert set(found["rounds"]) == {"exporter-int8-block128"}
    assert set(found["missing"]) == {name for name in SERVERS if name.startswith("llama")}
    assert "not on the PATH" in found["missing"]["llama-server-q8_0"]
    for streams, tokens in (("1", 2 * 8), ("3", 3 * 8)):
        (one,) = found["rounds"]["exporter-int8-block128"][streams]
        assert one["tokens"] == tokens, "stop tokens are ignored"
        assert one["rate"] == pytest.approx(tokens / one["seconds"])
        assert 0 < one["first_p50"] <= one["first_p99"] < 1e3 * one["seconds"]
        assert 0 < one["gap_p99"] < 1e3 * one["seconds"]
        assert one["peak"] > 50e6
    assert not list(work.glob("tmp*")), "the servers' scratch directories are gone"


def test_figures_are_the_clients() -> None:
    answers = [Answer(first=0.1 * (i + 1), gaps=[0.01, 0.03], tokens=3) for i in range(4)]
    found = bench_serve.figures(Load(2.0, answers), 7)
    assert (found.rate, found.tokens, found.peak) == (6.0, 12, 7)
    assert found.first_p50 == pytest.approx(250)
    assert 390 < found.first_p99 <= 400
    assert found.gap_p99 == pytest.approx(30)


def test_the_table_has_every_ratio() -> None:
    def one(rate: float) -> bench_serve.Figures:
        return bench_serve.Figures(rate, 1, 2, 3, 10**9, 64, 1.0)

    found = {
        "exporter-int8": {1: [one(10), one(20)], 8: [one(40), one(60)]},
        "llama_cpp.server-q8_0": {1: [one(5), one(20)], 8: [one(8), one(30)]},
    }
    text = bench_serve.table("x", found, {"llama-server-q8_0": "not there"})
    assert "| exporter-int8 | 3.50 |" in text  # the median of 40/10 and 60/20
    assert "| exporter-int8 / llama_cpp.server-q8_0 | 1.50 | 3.50 |" in text
    assert "missing: llama-server-q8_0: not there" in text


def test_the_peers_have_what_their_server_needs() -> None:
    assert SERVER_PEERS[: len(PEERS)] == PEERS
    assert SERVER_PEERS[-1].startswith("llama-cpp-python[server]==")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return soak.make_bundles(tmp_path_factory.mktemp("soaked"))


@pytest.fixture(scope="module")
def prepared(bundles: dict[str, Path]) -> soak.Soak:
    return soak.prepared(bundles)


@pytest.mark.slow
def test_answers_known_beforehand_cover_models_apis_and_sampling(prepared: soak.Soak) -> None:
    assert {case.body["model"] for case in prepared.cases} == {"demo8", "demo4", "base", "poet"}
    assert {case.path for case in prepared.cases} == {COMPLETIONS, CHAT}
    assert {len(case.texts) for case in prepared.cases} == {1, 3}
    assert {"stop", "length"} == {reason for case in prepared.cases for reason in case.reasons}
    assert len({case.texts for case in prepared.cases}) > len(prepared.cases) / 2


@pytest.mark.slow
def test_two_short_lives_go_without_a_failure(
    bundles: dict[str, Path], prepared: soak.Soak, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = replace(prepared, outcomes=soak.Counter(), failures=[], lives=[])
    monkeypatch.setattr(soak, "GAPS", (0.05,))
    for number in range(2):
        chance, log = random.Random(number), tmp_path / f"{number}.log"
        asyncio.run(soak.live(found, bundles, log, 4.0, chance, cut_short=number == 0))
    assert not found.failures
    assert [life.code for life in found.lives] == [143, 143]
    assert found.outcomes["streamed", "answered"] > 5
    assert found.lives[1].tokens > 20
    assert "0 failures" in soak.table(found)


@pytest.fixture(scope="module")
def served(bundles: dict[str, Path]):
    with running([f"demo8={bundles['demo8']}"]) as server:
        yield server


def first_case(prepared: soak.Soak) -> Any:
    return next(one for one in prepared.cases if one.body["model"] == "demo8" and one.reasons == ("length",))


@pytest.mark.parametrize("client", [soak_clients.whole, soak_clients.streamed, soak_clients.cancelled])
@pytest.mark.slow
def test_a_wrong_token_is_found(prepared: soak.Soak, served: Running, client: soak.Client) -> None:
    case, target = first_case(prepared), soak_clients.Target(served.url)
    last = random.Random(2)  # it draws a late leave, so that there is something to compare
    assert asyncio.run(client(target, case, last)) in ("answered", "went away")
    wrong = replace(case, texts=("#" + case.texts[0][1:],))
    with pytest.raises(soak_clients.Wrong, match="a wrong token"):
        asyncio.run(client(target, wrong, random.Random(2)))


@pytest.mark.slow
def test_a_missing_refusal_is_found(prepared: soak.Soak, served: Running) -> None:
    case, target, chance = first_case(prepared), soak_clients.Target(served.url), random.Random(0)
    fine = soak.Bad("a good request", dict(case.body), 400, path=case.path)
    with pytest.raises(soak_clients.Wrong, match="it was answered"):
        asyncio.run(soak_clients.refused(target, fine, chance))
    other = soak.Bad("an unknown model", {"model": "x", "prompt": "y"}, 400)
    with pytest.raises(soak_clients.Wrong, match="404"):
        asyncio.run(soak_clients.refused(target, other, chance))


@pytest.mark.slow
def test_a_server_that_is_gone_is_found_unless_it_was_told_to_go(prepared: soak.Soak) -> None:
    case, gone = first_case(prepared), soak_clients.Target("http://127.0.0.1:9")
    with pytest.raises(soak_clients.Wrong, match="lost"):
        asyncio.run(soak_clients.whole(gone, case, random.Random(0)))
    gone.stopped_at = 0.0
    assert asyncio.run(soak_clients.whole(gone, case, random.Random(0))) == "closed after SIGTERM"


def test_a_verdict_reads_exit_memory_and_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"level": "info", "event": "request"}\n')
    good = soak.Life(300, warm=5e8, last=5.01e8, code=143)
    assert soak.verdict(good, log) == []
    assert "ended with 1" in soak.verdict(replace(good, code=1), log)[0]
    assert "memory grew by 50.0 MB" in soak.verdict(replace(good, last=5.5e8), log)[0]
    assert soak.verdict(replace(good, seconds=10, last=5.5e8), log) == []
    for line in ('{"level": "error", "event": "internal_error"}', "Traceback (most recent call last):"):
        log.write_text(line + "\n")
        assert soak.verdict(good, log) == [f"the log: {line}"]
