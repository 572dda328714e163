"""`preble-sgl workers`: the workers of the fleets that run here, as a table."""

from io import StringIO

from rich.console import Console
from rich.table import Table

from preble_sgl.control import list_workers

COLUMNS = ("worker", "state", "running", "held", "KV used", "finished", "hit rate", "URL", "process")


async def worker_table() -> str:
    """Return the table as text. Raises InputError if no fleet runs here."""
    table = Table(*COLUMNS, box=None, header_style="bold")
    for worker in await list_workers():
        cached, prompt = worker["cached_tokens"], worker["prompt_tokens"]
        table.add_row(
            worker["worker_id"],
            "drains" if worker["is_draining"] else "up",
            str(worker["num_running"]),
            str(worker["num_held"]),
            f"{worker['used_tokens'] / worker['kv_tokens']:.0%}",
            str(worker["num_finished"]),
            f"{cached / prompt:.0%}" if prompt else "–",
            worker["url"],
            str(worker["pid"]),
        )
    text = StringIO()
    Console(file=text, width=160).print(table)
    return text.getvalue()
