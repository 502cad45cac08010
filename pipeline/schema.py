"""Print the JSON Schema of search-space files: `python -m pipeline.schema > search_spaces/schema.json`."""

from __future__ import annotations

import json

from pipeline.space import file_form


def schema_text() -> str:
    """Return the schema as JSON text, as it stands in `search_spaces/schema.json`."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **file_form().model_json_schema()}
    return json.dumps(schema, indent=1) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
