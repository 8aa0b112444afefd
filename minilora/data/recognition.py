"""Which shape a record has, under its own names of fields or under those that are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minilora.data.foreign_shapes import FOREIGN
from minilora.data.preference_shapes import PREFERENCES
from minilora.data.problems import renaming
from minilora.data.shapes import QUESTION, SHAPES, TOKENS, Record, Shape
from minilora.files import nearest

# A field of one of these beside another shape's says that the record is not understood.
STRICT = tuple(shape for shape in SHAPES if shape not in (QUESTION, TOKENS))


def _known() -> tuple[Shape, ...]:
    return (*SHAPES, *FOREIGN, *PREFERENCES)


def resolve(record: Any, fields: Mapping[str, str] | None = None) -> tuple[Shape, Record]:
    """Return a record's shape, and the record with its fields renamed as `fields` says."""
    if not isinstance(record, Mapping):
        raise ValueError(f"a record must be an object, found {type(record).__name__}")
    if fields:
        record = _renamed(record, fields)
    filled = {key: value for key, value in record.items() if value is not None}
    plain = {str(key).strip().lower(): value for key, value in filled.items()}
    # Without what a table lacks in this row; else as it is; else with names in capitals, as
    # tables made by hand have them.
    for each in (filled, record, plain):
        if len(each) >= len(filled) and (shape := _shape(each)) is not None:
            return shape, _in_small_letters(each, {*shape.keys, *shape.more})
    raise ValueError(_unknown(record, fields or {}))


def _in_small_letters(record: Record, names: set[str]) -> Record:
    """Return a record whose fields have these names where they are written in other letters."""
    other = {key: str(key).strip().lower() for key in record if key not in names}
    lacking = names - record.keys()
    found = {other[k] if other.get(k) in lacking else k: value for k, value in record.items()}
    return found if len(found) == len(record) else record  # two fields of one name


def _shape(record: Record) -> Shape | None:
    """Return the one shape whose fields a record has, None of none or several."""
    found = [shape for shape in _known() if record.keys() >= {*shape.keys} and shape.fits(record)]
    whole = [  # without those whose fields are fields of another one
        one
        for one in found
        if not any({*one.keys} < {*other.keys, *other.more} for other in found if other is not one)
    ]
    if len(whole) > 1 and TOKENS in whole:  # tokens kept beside text
        whole.remove(TOKENS)
    if len(whole) == 1:
        read = {*whole[0].keys, *whole[0].more}
        stray = {key for shape in STRICT if not read & {*shape.keys} for key in shape.keys}
        if not any(key in record for key in stray):
            return whole[0]
    return None


def _known_fields() -> set[str]:
    return {key for shape in _known() for key in (*shape.keys, *shape.more)}


def _unknown(record: Record, fields: Mapping[str, str]) -> str:
    """Say what a record must have, and how to name the fields it has."""
    if ("chosen" in record) != ("rejected" in record):
        there, lacking = sorted(("chosen", "rejected"), key=lambda key: key not in record)
        return (
            f"a preference record must have chosen and rejected, found {there} without {lacking}; "
            f"add it, or learn {there} alone: {renaming({'prompt': 'prompt', 'completion': there})}"
        )
    *most, last = (" and ".join(shape.keys) for shape in SHAPES)
    # In quotes, in which alike faults may differ: they are said once.
    found = f"'{', '.join(map(str, record)):.100}'" if record else "nothing"
    known = sorted(_known_fields())
    odd = [name for name in fields if name not in known]
    if odd:
        hint = f"; fields (--map) names {odd[0]!r}, which is none of these{nearest(odd[0], known)}"
    else:
        two = len(record) == 2 and all(str(key).isidentifier() for key in record)
        question, answer = map(str, record) if two else ("FIELD", "FIELD")
        meant = {"question": question, "answer": answer}
        hint = f"; say which is which, as in {renaming(meant)}"
    return f"a record must have {', '.join(most)}, or {last}, found {found}{hint}"


def _renamed(record: Record, fields: Mapping[str, str]) -> Record:
    """Return a record with the shape's names for its fields, and no others of any shape."""
    lacking = [field for field in fields.values() if field not in record]
    if lacking:
        swapped = {field: name for name, field in fields.items() if name in record}
        if len(swapped) == len(fields) and set(swapped) <= _known_fields():
            raise ValueError(
                f"the name that a shape has for a field stands first, found {renaming(fields)}; "
                f"write {renaming(swapped)}"
            )
        raise ValueError(
            f"a record must have the field {lacking[0]!r} that was named, found "
            f"{', '.join(map(str, record)) or 'nothing':.100}"
            f"{nearest(lacking[0], map(str, record))}"
        )
    meant = [shape for shape in _known() if set(shape.keys) <= set(fields)]
    others = {key for shape in _known() for key in shape.keys}
    others -= {key for shape in meant for key in shape.more}
    rest = {  # what has the name of another shape's field is reported as unread
        f"{key} (not named)" if key in others else key: value
        for key, value in record.items()
        if key not in fields.values()
    }
    return rest | {name: record[field] for name, field in fields.items()}
