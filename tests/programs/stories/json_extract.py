"""Two contracts, one of which leaves things out."""

from preble_sgl.core import Request
from programs.json_extract import json_extract

PROGRAM = json_extract
ROWS = [
    {"document": "Anna Berg (seller) and Otto Lind agree on 400 EUR, due 2031-05-01, for a used piano."},
    {"document": "Rosa Klein lends her bicycle to a neighbour."},
]
STATIC = True


def answers(request: Request, prompt: str) -> str:
    """Extract what is there."""
    is_sale = "piano" in prompt
    if "record.0" in request.call_path:
        return (
            '[{"name": "Anna Berg", "role": "seller"}]'
            if is_sale
            else '[{"name": "Rosa Klein", "role": null}]'
        )
    if "record.1" in request.call_path:
        if is_sale:
            return '{"amount": 400, "currency": "EUR", "due_date": "2031-05-01"}'
        return '{"amount": null, "currency": null, "due_date": null}'
    return "A piano is sold." if is_sale else "A bicycle is lent."
