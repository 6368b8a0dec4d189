"""The licence that a model's card states, and the cards that state none."""

from pathlib import Path

import pytest

from exporter.merging.card import licence_of
from tests.hostile.cards import CARDS
from tests.limits import limits

STATED = {
    "license: mit": "mit",
    "language: en\r\nlicense: mit\r\ntags:\r\n- x": "mit",
    'license: "apache-2.0"  # as LICENSE says': "apache-2.0",
    "license: other\nlicense_name: Llama 3\nlicense_link: LICENSE": "Llama 3",
    "license_name: null\nlicense: mit": "mit",
    "license: other\nlicense_name: >-\n  a name that\n  is folded\ntags: [x]": "a name that is folded",
    "license: mit\nlicense: gpl-3.0": "gpl-3.0",
    "model-index: [{name: x, results: [{value: 1}]}]\nlicense: mit": "mit",
    "x: [\nlicense: mit": "mit",
    "tags: [license]\ndescription: the license is mit": "unknown",
    "parts:\n  license: mit": "unknown",
}


@pytest.mark.parametrize(("front", "licence"), STATED.items())
def test_the_licence_is_that_of_the_front_matter(tmp_path: Path, front: str, licence: str) -> None:
    (tmp_path / "README.md").write_bytes(f"---\n{front}\n---\n\n# A model\n\nlicense: none\n".encode())
    assert licence_of(tmp_path) == licence


def test_what_follows_the_front_matter_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\n" + b"\xff" * (1 << 20))
    assert licence_of(tmp_path) == "mit"


def test_a_directory_without_a_card_states_none(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == "unknown"
    (tmp_path / "README.md").mkdir()
    assert licence_of(tmp_path) == "unknown"


@pytest.mark.parametrize("name", CARDS)
def test_a_hostile_card_states_none_and_costs_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "README.md").write_bytes(CARDS[name])
    with limits(seconds=5, memory=256 << 20):
        assert licence_of(tmp_path) == "unknown"
