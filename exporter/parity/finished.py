"""Results of the bundles that an interrupted run had finished: they stand in its scratch directory until it is done."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from exporter.files import write_atomically
from exporter.manifest import code_digest
from exporter.parity.bundles import Bundle
from exporter.parity.result import BundleResult


@dataclass(frozen=True, slots=True)
class Finished:
    """facts: all that a result depends on beside its bundle, and beside what names the directory."""

    directory: Path
    facts: Mapping[str, Any]

    def read(self, bundle: Bundle) -> BundleResult | None:
        """None where no result of this bundle stands, or one that cannot be read."""
        try:
            found = TypeAdapter(BundleResult).validate_json(self.path(bundle).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None
        return replace(found, directory=str(bundle.directory))

    def write(self, bundle: Bundle, result: BundleResult) -> None:
        write_atomically(self.path(bundle), json.dumps(asdict(result), allow_nan=False).encode())

    def path(self, bundle: Bundle) -> Path:
        facts = {
            **self.facts,
            "code": code_digest(),
            "content": bundle.content,
            "provenance": bundle.provenance,
            "merge_dtype": bundle.merge_dtype,
            "others": bundle.others,
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.directory / f"result-{digest[:16]}.json"
