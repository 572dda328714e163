"""Generated values of a declared type that are not known yet: their JSON schema says what can be asked.

An enumeration, a truth value and an optional field are decided when they are looked at; the length of a list
when somebody walks over it, if the schema bounds it; a number when it is compared. Written into a prompt,
each part of a value is the whole generation.
"""

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NoReturn, get_type_hints

import orjson

from preble_sgl.dsl.decisions import Undecided, decide
from preble_sgl.dsl.holes import YES_NO, ChoiceHole, Hole
from preble_sgl.dsl.schema import json_schema_of

Schema = Mapping[str, Any]

MOST_VALUES = 16
"""A whole number or a list is decided value by value if there are at most so many."""


def typed_hole(text: str, type_: Any, schema: str | None = None) -> Any:
    """Return a hole of a type, or of a JSON schema if there is no type for it."""
    source = schema or json_schema_of(type_)
    if source is None:
        return Hole(text)
    root = orjson.loads(source)
    return _value(text, root, root, None if schema else type_)


def _value(text: str, schema: Schema, root: Schema, type_: Any) -> Any:
    """Return the hole that fits a part of a schema; asks which part it is where that is open."""
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if isinstance(type_, type) and issubclass(type_, Enum):
        return decide(f"which {type_.__name__}", list(type_))
    for open_ in ("anyOf", "oneOf"):
        if open_ in schema:
            return _value(text, decide("which kind of value", schema[open_]), root, None)
    if "allOf" in schema:
        return _value(text, schema["allOf"][0], root, type_)
    options = [schema["const"]] if "const" in schema else schema.get("enum")
    if options is not None:
        texts = all(isinstance(option, str) for option in options)
        return ChoiceHole.of(text, options) if texts else decide("which value", options)
    return _of_type(text, schema, root, type_)


def _of_type(text: str, schema: Schema, root: Schema, type_: Any) -> Any:
    match schema.get("type"):
        case "string":
            return Hole(text)
        case "boolean":
            return decide("true or false", YES_NO)
        case "null":
            return None
        case "integer" | "number":
            return NumberHole(text, schema)
        case "array":
            return ListHole(text, schema, root)
        case _:
            return ObjectHole(text, schema, root, type_)


class Written:
    """What can be written into a prompt."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return self._text

    def __format__(self, spec: str) -> str:
        return self._text


class NumberHole(Written):
    """A number. Comparing it is a decision; so is its value, if there are few."""

    __slots__ = ("_high", "_known", "_low")

    def __init__(self, text: str, schema: Schema) -> None:
        super().__init__(text)
        is_whole = schema.get("type") == "integer"
        self._low = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1) if is_whole else None
        self._high = schema.get("maximum", schema.get("exclusiveMaximum", 1 << 62) - 1) if is_whole else None
        self._known: int | None = None

    def __int__(self) -> int:
        if self._known is None:
            if self._low is None or self._high is None or not 0 <= self._high - self._low < MOST_VALUES:
                raise Undecided("depends on the value of a generated number: bound it (ge=, le=)")
            self._known = decide("which number", range(self._low, self._high + 1))
        return self._known

    __index__ = __int__

    def __float__(self) -> float:
        return float(int(self))

    def __hash__(self) -> int:
        return hash(int(self))

    def _compare(self, other: object) -> bool:
        return decide("a comparison with a generated number", YES_NO)

    def _number(self, *_: Any) -> "NumberHole":
        return NumberHole(self._text, {})

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _compare

    def __bool__(self) -> bool:
        return self._compare(0)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _number
    __floordiv__ = __rfloordiv__ = __mod__ = __pow__ = __neg__ = __abs__ = __round__ = _number


class ListHole(Written):
    """A list. Walking over it decides how long it is, if the schema bounds that."""

    __slots__ = ("_items", "_most", "_num", "_root", "_schema")

    def __init__(self, text: str, schema: Schema, root: Schema, most: int | None = None) -> None:
        super().__init__(text)
        self._schema = schema
        self._root = root
        self._most = schema.get("maxItems") if most is None else min(most, schema.get("maxItems", most))
        self._num: int | None = None
        self._items: dict[int, Any] = {}

    def __len__(self) -> int:
        if self._num is None:
            num_fixed = len(self._schema.get("prefixItems", ()))
            least = max(num_fixed, self._schema.get("minItems", 0))
            most = (num_fixed or None) if self._most is None else self._most
            if most is None:
                raise Undecided("depends on the length of a generated list: bound it (max_length=)")
            self._num = decide("how many items", _spread(min(least, most), most))
        return self._num

    def _item(self, place: int) -> Any:
        if place not in self._items:
            fixed: Sequence[Schema] = self._schema.get("prefixItems", ())
            schema = fixed[place] if 0 <= place < len(fixed) else self._schema.get("items", {})
            self._items[place] = _value(self._text, schema, self._root, None)
        return self._items[place]

    def __iter__(self) -> Iterator[Any]:
        return map(self._item, range(len(self)))

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            return self._item(key)
        if self._num is None and key.start is None and isinstance(key.stop, int) and key.stop >= 0:
            return ListHole(self._text, self._schema, self._root, key.stop)
        return [self._item(place) for place in range(*key.indices(len(self)))]

    def __contains__(self, item: object) -> bool:
        return decide("in of a generated list", YES_NO)

    def __bool__(self) -> bool:
        return len(self) > 0

    __eq__ = __contains__
    __hash__ = None  # type: ignore[assignment]


class ObjectHole(Written):
    """An object: a pydantic model, a dataclass, a dict. Its fields are holes."""

    __slots__ = ("_fields", "_root", "_schema", "_type")

    def __init__(self, text: str, schema: Schema, root: Schema, type_: Any) -> None:
        super().__init__(text)
        self._schema = schema
        self._root = root
        self._type = type_
        self._fields: dict[str, Any] = {}

    def has_field(self, name: str) -> bool:
        """Return whether the schema has a field."""
        return name in self._schema.get("properties", {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not self.has_field(name):
            raise AttributeError(f"a generated value has no field {name}")
        return self[name]

    def __getitem__(self, name: str) -> Any:
        if name not in self._fields:
            schema = self._schema.get("properties", {}).get(name) or self._schema.get("additionalProperties")
            if not isinstance(schema, Mapping):
                raise KeyError(name)
            self._fields[name] = _value(self._text, schema, self._root, _hint(self._type, name))
        return self._fields[name]

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """The declared type, so that `isinstance` says what it will say of the value."""
        return self._type if isinstance(self._type, type) else ObjectHole

    def __eq__(self, other: object) -> bool:
        return self is other or decide("== of a generated value", YES_NO)

    def _refuse(self, *_: Any) -> NoReturn:
        raise Undecided("depends on a generated value as a whole: use its fields")

    __iter__ = __len__ = __contains__ = __hash__ = _refuse


def _spread(least: int, most: int) -> Sequence[int]:
    """Return all numbers of a range, most first, or a few of them if they are many."""
    if most - least < MOST_VALUES:
        return range(most, least - 1, -1)
    return (most, least, (least + most) // 2)


def _hint(type_: Any, name: str) -> Any:
    """Return a field's annotation, or None when there is no class that says."""
    if not isinstance(type_, type):
        return None
    try:
        return get_type_hints(type_).get(name)
    except (NameError, TypeError):
        return None
