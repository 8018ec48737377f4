"""The schema of a KubeRay RayJob, as far as an example needs it.

``python -m tests.cluster.kuberay CRD.yaml VERSION < README.md > tests/cluster/rayjob.schema.json``
prunes the public resource definition, ``ray-operator/config/crd/bases/ray.io_rayjobs.yaml`` of
https://github.com/ray-project/kuberay (Apache 2.0), whose own text has 1.4 MB. Kept are the names
of all fields beside those that the example has, and what is below those that it has.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

SCHEMA = Path(__file__).with_name("rayjob.schema.json")
SOURCE = "https://github.com/ray-project/kuberay/blob/{}/ray-operator/config/crd/bases/ray.io_rayjobs.yaml"


def example(text: str) -> Any:
    """The RayJob in a document: its one YAML block of that kind."""
    (found,) = [
        block
        for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
        if "kind: RayJob" in block
    ]
    return yaml.safe_load(found)


def pruned(schema: dict[str, Any], value: Any) -> dict[str, Any]:
    """What of a schema speaks of a value, closed against fields that it does not know.

    A cluster drops such a field without a word.
    """
    kept = {
        name: inner
        for name, inner in schema.items()
        if name in ("type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength")
    }
    if schema.get("x-kubernetes-int-or-string"):
        kept["type"] = ["integer", "string"]
    if "required" in schema:
        kept["required"] = schema["required"]
    if "properties" in schema:
        given = value if isinstance(value, dict) else {}
        kept["properties"] = {
            name: pruned(inner, given[name]) if name in given else {}
            for name, inner in schema["properties"].items()
        }
        kept["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = pruned(schema["additionalProperties"], None)
    if "items" in schema:
        merged: Any = {}
        for each in value or []:
            merged = {**merged, **each} if isinstance(each, dict) else each
        kept["items"] = pruned(schema["items"], merged)
    return kept


def main() -> None:
    """Prune a definition by the example on the standard input."""
    definition = yaml.safe_load(Path(sys.argv[1]).read_text())
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = pruned(version["schema"]["openAPIV3Schema"], example(sys.stdin.read()))
    schema["properties"]["metadata"] = {"type": "object"}
    print(json.dumps({"$comment": SOURCE.format(sys.argv[2]), **schema}, indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
