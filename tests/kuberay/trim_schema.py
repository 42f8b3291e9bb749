"""Makes rayjob.json: the part of KubeRay's RayJob schema that configs/kuberay uses.

    git -C kuberay show v1.7.0:ray-operator/config/crd/bases/ray.io_rayjobs.yaml > ray.io_rayjobs.yaml
    python tests/kuberay/trim_schema.py ray.io_rayjobs.yaml

KubeRay (https://github.com/ray-project/kuberay) is under the Apache License 2.0. What is left is as it was, but that a
field which is not in it is an error (``additionalProperties``), as `kubectl apply --validate=strict` has it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

POD = frozenset({"containers", "volumes", "nodeSelector", "restartPolicy"})
KEPT: dict[str, frozenset[str]] = {
    "template.spec": POD,
    "containers": frozenset({"name", "image", "command", "args", "env", "resources", "volumeMounts"}),
    "volumes": frozenset({"name", "persistentVolumeClaim"}),
    "rayClusterSpec": frozenset({"rayVersion", "headGroupSpec", "workerGroupSpecs"}),
}
"""Last names of a path -> the fields below it that stay; all where a path is not named."""
LEFT_OUT = frozenset({"status", "submitterPodTemplate", "deletionStrategy", "valueFrom"})


def trimmed(schema: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """The schema under ``path`` without what is left out."""
    made = {name: value for name, value in schema.items() if name != "description"}
    if "properties" in schema:
        names = [KEPT[end] for end in KEPT if ".".join(path).endswith(end)]
        fields = {
            name: trimmed(value, (*path, name))
            for name, value in schema["properties"].items()
            if name not in LEFT_OUT and all(name in kept for kept in names)
        }
        made |= {"properties": fields, "additionalProperties": False}
    for inner in ("items", "additionalProperties"):
        if isinstance(schema.get(inner), dict):
            made[inner] = trimmed(schema[inner], path)
    return made


def main() -> None:
    """From a CRD to the schema of its version v1."""
    tree = yaml.safe_load(Path(sys.argv[1]).read_text())
    (found,) = (version for version in tree["spec"]["versions"] if version["name"] == "v1")
    made = trimmed(found["schema"]["openAPIV3Schema"])
    Path(__file__).with_name("rayjob.json").write_text(json.dumps(made, sort_keys=True, indent=1) + "\n")


if __name__ == "__main__":
    main()
