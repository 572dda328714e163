"""A plan as one page that needs nothing else."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preble_sgl.dsl.plan import Plan


def page(plan: "Plan") -> str:
    """Return the page as HTML."""
    raise NotImplementedError
