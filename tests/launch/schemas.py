"""Kubernetes objects against published schemas, made strict: a key that a schema does not know is an error."""

import re
from typing import Any, get_args

from pydantic import BaseModel


class UnknownKey(ValueError):
    """A manifest has a key that its kind does not have."""


def check(manifest: dict[str, Any]) -> None:
    """Check one document of a manifest.

    Raises:
        UnknownKey: of Kubeflow's kinds.
        Exception: what a schema refuses otherwise: kubernetes-validate's ValidationError, pydantic's, ValueError.
    """
    match manifest["kind"]:
        case "PyTorchJob":
            _check_pytorchjob(manifest)
        case "TrainJob" | "TrainingRuntime" as kind:
            import kubeflow_trainer_api.models as models

            model = getattr(models, f"TrainerV1alpha1{kind}")
            _forbid_unknown(model, manifest, kind)
            model.from_dict(manifest)
        case _:
            _check_core(manifest)


def _check_core(manifest: dict[str, Any]) -> None:
    import kubernetes_validate

    kubernetes_validate.validate(manifest, "1.37", strict=True)


def _forbid_unknown(model: type[BaseModel], value: Any, place: str) -> None:
    """Compare a value with a generated pydantic model, which by itself passes over what it does not know."""
    fields = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    if "actual_instance" in fields:  # a number or text: no keys
        return
    for key, inner in value.items():
        if key not in fields:
            raise UnknownKey(f"{place}.{key}")
        model_of_inner = _model_in(fields[key])
        if model_of_inner is not None:
            values = inner if isinstance(inner, list) else [inner]
            is_mapping = "Dict[" in str(fields[key])
            for one in inner.values() if is_mapping else values:
                _forbid_unknown(model_of_inner, one, f"{place}.{key}")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation such as Optional[List[Model]] holds, if any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _check_pytorchjob(manifest: dict[str, Any]) -> None:
    """The operator's own layers by its models; the pod template in them as a Pod."""
    import kubeflow.training.models as models

    def look(kind: str, value: Any, place: str) -> None:
        inside = re.fullmatch(r"(?:dict\(str, |list\[)(\w+)[)\]]", kind)
        if inside:
            for one in value.values() if isinstance(value, dict) else value:
                look(inside[1], one, place)
        elif kind == "V1PodTemplateSpec":
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": value.get("metadata", {}), "spec": value["spec"]}
            assert value.keys() <= {"metadata", "spec"}, place
            _check_core(pod)
        elif hasattr(models, kind):
            model = getattr(models, kind)
            types = {model.attribute_map[name]: inner for name, inner in model.openapi_types.items()}
            for key, inner in value.items():
                if key not in types:
                    raise UnknownKey(f"{place}.{key}")
                look(types[key], inner, f"{place}.{key}")
        elif kind in ("int", "str", "bool") and type(value).__name__ != kind:
            raise ValueError(f"{place}: {value!r} is not of type {kind}")

    look("KubeflowOrgV1PyTorchJob", manifest, "PyTorchJob")
