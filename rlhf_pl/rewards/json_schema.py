"""JSON Schemas from untrusted files: references to URLs and files are never fetched or opened."""

from collections.abc import Mapping
from typing import Any

from rlhf_pl.utils.errors import InputError

_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


def make_schema_validator(schema: Any) -> Any:
    """Make a validator that resolves references only within the schema and to the drafts in the jsonschema package.

    Raises:
        InputError: It is not a schema, or refers to anything else.
    """
    import jsonschema
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import CannotDetermineSpecification, Unresolvable
    from referencing.jsonschema import DRAFT202012, specification_with

    if not isinstance(schema, Mapping | bool):
        raise InputError(f"`rollout.reward.schema` must be a JSON Schema, got {type(schema).__name__}.")
    try:
        validator_class = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        validator_class.check_schema(schema)
        draft = specification_with(validator_class.META_SCHEMA["$schema"], default=DRAFT202012)
        resource = draft.create_resource(schema)
        _check_references(resource, REGISTRY.resolver_with_root(resource))
    except jsonschema.SchemaError as error:
        raise InputError(f"`rollout.reward.schema` is not a JSON Schema: {error.message[:300]}.") from error
    except Unresolvable as error:
        raise InputError(
            f"`rollout.reward.schema` refers to {str(error.ref)[:300]!r}, which it does not contain. Nothing is "
            "fetched or opened: put the definition under `$defs` of the schema."
        ) from error
    except (CannotDetermineSpecification, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"`rollout.reward.schema` is not a JSON Schema: {type(error).__name__}: {error}.") from error
    return validator_class(schema, registry=REGISTRY)


def _check_references(resource: Any, resolver: Any) -> None:
    """Resolve every reference, to find external ones before any response is scored."""
    if isinstance(resource.contents, Mapping):
        for keyword in _REFERENCES:
            if isinstance(reference := resource.contents.get(keyword), str):
                resolver.lookup(reference)
    for part in resource.subresources():
        _check_references(part, resolver.in_subresource(part))
