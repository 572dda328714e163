"""The least value of a type: what stands for an answer that nobody wrote."""

from enum import Enum
from typing import Annotated, Any, Literal, Optional

import pytest
from pydantic import BaseModel, Field, TypeAdapter

from preble_sgl.dsl.least_value import least_value


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Point(BaseModel):
    x: int = Field(ge=3, le=9)
    y: float = Field(gt=0.25, lt=0.75)


class Node(BaseModel):
    name: str = Field(min_length=3)
    child: Optional["Node"]


class Drawing(BaseModel):
    title: str
    colour: Colour
    points: list[Point] = Field(min_length=2)
    corner: Point | None
    kind: Literal["open", "closed"]
    version: Literal[2]
    note: str = "left out"


@pytest.mark.parametrize(
    ("type_", "least"),
    [
        (int, 0),
        (float, 0),
        (bool, False),
        (None, None),
        (Literal["yes", "no"], "yes"),
        (Colour, Colour.RED),
        (int | None, None),
        (int | str, 0),
        (list[int], []),
        (dict[str, int], {}),
        (tuple[int, str, bool], (0, "x", False)),
        (Point, Point(x=3, y=0.5)),
        (Node, Node(name="xxx", child=None)),
        (
            Drawing,
            Drawing(
                title="x",
                colour=Colour.RED,
                points=[Point(x=3, y=0.5)] * 2,
                corner=None,
                kind="open",
                version=2,
            ),
        ),
    ],
)
def test_the_least_value_fits_its_type(type_: Any, least: Any) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(type_)
    assert adapter.validate_python(least_value(adapter.json_schema())) == least


@pytest.mark.parametrize(
    ("bounds", "least"),
    [
        (Field(ge=-7), -7),
        (Field(gt=4), 5),
        (Field(gt=-4, lt=9), -3),
        (Field(le=-5), -5),
        (Field(lt=-5), -6),
        (Field(le=5), 0),
        (Field(lt=5), 0),
    ],
)
def test_the_least_number_keeps_its_bounds(bounds: Any, least: int) -> None:
    adapter: TypeAdapter[int] = TypeAdapter(Annotated[int, bounds])
    assert adapter.validate_python(least_value(adapter.json_schema())) == least
