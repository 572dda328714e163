"""Free ports on loopback for a runtime that is about to start."""

import random
import socket
from collections.abc import Container, Iterator
from dataclasses import dataclass, fields

HOST = "127.0.0.1"
WILDCARDS = ("*", "0.0.0.0", "[::]")
"""Hosts of endpoints that mean every address of the machine."""
# Below the kernel's ephemeral ports, one of which may be taken by any connection while a runtime starts.
FREE_PORTS = range(20000, 32768)


@dataclass(frozen=True, slots=True)
class Ports:
    """What one runtime listens on: requests, its ranks' rendezvous, cache events and their replay, load."""

    http: int
    nccl: int
    events: int
    replay: int
    load: int


def choose_ports(wanted: int | None, free: Iterator[int]) -> Ports:
    """Return ports for one runtime, all of them from `free` but the one for requests if it is `wanted`."""
    http = next(free) if wanted is None else wanted
    return Ports(http, *(next(free) for _ in fields(Ports)[1:]))


def free_ports(taken: Container[int | None]) -> Iterator[int]:
    """Yield ports that nobody uses, each once, at random so that two launchers rarely meet."""
    for port in random.sample(FREE_PORTS, len(FREE_PORTS)):
        if port not in taken and is_free(port):
            yield port


def to_loopback(endpoint: str) -> str:
    """Return an endpoint of ZeroMQ with a wildcard host made loopback's; any other as it is."""
    for host in WILDCARDS:
        endpoint = endpoint.replace(f"tcp://{host}:", f"tcp://{HOST}:")
    return endpoint


def is_free(port: int) -> bool:
    """Return whether a server could listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
