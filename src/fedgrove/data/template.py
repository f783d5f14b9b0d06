"""Templates of a record's fields, such as ``"{question}\\n{answer}"``.

Any key of a record may stand between braces. A brace that belongs to the text is doubled, as in Python's format strings, but
nothing else of these is understood: no attributes, no indices, no conversions. A template reads fields and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

MISSING = object()  # what `look_up` returns for a field that a record does not have; None is a value


def template_fields(template: str) -> list[str]:
    """The field names of a template, in order.

    Raises:
        ValueError: a brace is left open or closed twice, or the template names no field.
    """
    fields = [field for _, field in parse_template(template) if field is not None]
    if not fields:
        raise ValueError("it names no field; write for instance {text}")
    return fields


@lru_cache(maxsize=256)
def parse_template(template: str) -> tuple[tuple[str, str | None], ...]:
    """A template as (literal text, the field that follows it) pairs; the last pair may have no field.

    Raises:
        ValueError: see :func:`template_fields`.
    """
    parts: list[tuple[str, str | None]] = []
    literal, position = "", 0
    while position < len(template):
        if template.startswith(("{{", "}}"), position):
            literal, position = literal + template[position], position + 2
        elif template[position] == "{":
            field, position = _field(template, position + 1)
            parts.append((literal, field))
            literal = ""
        elif template[position] == "}":
            raise ValueError("it has a } that closes no field; write }} for a brace of the text")
        else:
            literal, position = literal + template[position], position + 1
    return (*parts, (literal, None)) if literal or not parts else tuple(parts)


def _field(template: str, start: int) -> tuple[str, int]:
    """The field name that begins at ``start``, and where the template goes on.

    Doubled braces in a name stand for one. A run of closing braces ends the name with its first brace, unless the run only
    consists of doubled braces, or the name holds a brace that it closes.
    """
    name, position, is_open = "", start, 0
    while position < len(template):
        run = len(re.match(r"}*", template[position:])[0])  # type: ignore[index]  # the pattern matches everywhere
        if run and (run % 2 == 0 or is_open) and run > 1:
            name, position, is_open = name + "}", position + 2, max(0, is_open - 1)
        elif run:
            if not name:
                raise ValueError("{} names no field; write for instance {text}")
            return name, position + 1
        elif template.startswith("{{", position):
            name, position, is_open = name + "{", position + 2, is_open + 1
        elif template[position] == "{":
            raise ValueError(f"the field {{{name} is never closed; write {{{{ for a brace of the text")
        else:
            name, position = name + template[position], position + 1
    raise ValueError(f"the field {{{name} is never closed; write {{{{ for a brace of the text")


def template_of(field: str) -> str | None:
    """The template of one field, with the braces of its name doubled; None if no template can name the field."""
    template = "{" + field.replace("{", "{{").replace("}", "}}") + "}"
    try:
        return template if parse_template(template) == (("", field),) else None
    except ValueError:
        return None


def look_up(record: Mapping[str, Any], field: str) -> Any:
    """A record's field; ``a.b`` is the key ``b`` of the object in ``a`` where the record has no key ``a.b``.

    Returns:
        The value, or ``MISSING``.
    """
    if field in record:
        return record[field]
    for owner in owners(field, record):
        inner = record[owner]
        value = look_up(inner, field[len(owner) + 1 :]) if isinstance(inner, Mapping) else MISSING
        if value is not MISSING:
            return value
    return MISSING


def owners(field: str, names: Collection[str]) -> list[str]:
    """The keys of a record in which a field may be: the field itself, and what stands before a dot in it; longest first."""
    ends = [len(field), *reversed([match.start() for match in re.finditer(r"\.", field)])]
    return [field[:end] for end in ends if field[:end] in names]
