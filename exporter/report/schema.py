"""The published JSON Schema of verification.json, generated from the frozen types.

python -m exporter.report.schema > exporter/report/verification.schema.json
"""

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from exporter.parity.result import SCHEMA_VERSION, Verification

PUBLISHED = Path(__file__).with_name("verification.schema.json")


def adapter() -> TypeAdapter[Verification]:
    """Validates a document strictly: `adapter().validate_json(text, strict=True)`."""
    return TypeAdapter(Verification)


def schema() -> dict[str, Any]:
    """JSON Schema 2020-12 of what `Verification.to_json` writes."""
    document = adapter().json_schema(mode="serialization")
    document["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    document["title"] = f"exporter verification, schema version {SCHEMA_VERSION}"
    document["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    return _closed(document)


def _closed(document: dict[str, Any]) -> dict[str, Any]:
    """No object has keys that the schema does not name."""
    for definition in [document, *document.get("$defs", {}).values()]:
        if "properties" in definition:
            definition["additionalProperties"] = False
    return document


def text() -> str:
    return json.dumps(schema(), indent=1) + "\n"


if __name__ == "__main__":
    sys.stdout.write(text())
