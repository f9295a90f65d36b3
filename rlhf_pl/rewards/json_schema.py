"""JSON Schemas, perhaps of a stranger's: what they refer to is neither fetched nor opened."""

from collections.abc import Mapping
from typing import Any

from rlhf_pl.utils.errors import InputError

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


def schema_validator(schema: Any) -> Any:
    """A validator that knows the schema itself and the drafts of JSON Schema, which come with the jsonschema package.

    Raises:
        InputError: It is no schema, or refers to something else.
    """
    import jsonschema
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import CannotDetermineSpecification, Unresolvable
    from referencing.jsonschema import DRAFT202012, specification_with

    if not isinstance(schema, Mapping | bool):
        raise InputError(f"`rollout.reward.schema` must be a JSON Schema, got {type(schema).__name__}.")
    try:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
        draft = specification_with(kind.META_SCHEMA["$schema"], default=DRAFT202012)
        resource = draft.create_resource(schema)
        _check_references(resource, REGISTRY.resolver_with_root(resource))
    except jsonschema.SchemaError as error:
        raise InputError(f"`rollout.reward.schema` is no JSON Schema: {error.message[:300]}.") from error
    except Unresolvable as error:
        raise InputError(
            f"`rollout.reward.schema` refers to {str(error.ref)[:300]!r}, which is not in it. Nothing is fetched or "
            "opened: put what it refers to under `$defs` of the schema."
        ) from error
    except (CannotDetermineSpecification, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"`rollout.reward.schema` is no JSON Schema: {type(error).__name__}: {error}.") from error
    return kind(schema, registry=REGISTRY)


def _check_references(resource: Any, resolver: Any) -> None:
    """Resolve every reference, so that one which leads outside is found before there is an answer that needs it."""
    if isinstance(resource.contents, Mapping):
        for keyword in _REFERENCES:
            if isinstance(reference := resource.contents.get(keyword), str):
                resolver.lookup(reference)
    for part in resource.subresources():
        _check_references(part, resolver.in_subresource(part))
