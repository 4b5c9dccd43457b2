"""A port on which ingresses answer by themselves, without one of Serve's proxies between them and their clients.

`expertmesh serve` opens it and hands it to its ingresses through a unix socket. It outlives them: while one is
replaced, clients wait in its queue instead of being refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

BACKLOG = 2048
HANDOVER_S = 10.0
GRACE_S = 1


def family_of(host: str) -> socket.AddressFamily:
    """IPv6 for its addresses, IPv4 for all others and for names."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def shown(host: str, port: int) -> str:
    """`host:port` as it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextlib.contextmanager
def open_port(host: str, port: int) -> Iterator[str]:
    """Listen there, and give the port to whoever asks at the path that this yields. Raises OSError where it can't."""
    with (
        socket.create_server((host, port), family=family_of(host), backlog=BACKLOG) as listening,
        tempfile.TemporaryDirectory(prefix="expertmesh-") as folder,  # nobody else may enter it
        socket.socket(socket.AF_UNIX) as giver,
    ):
        path = str(Path(folder, "port"))
        giver.bind(path)
        giver.listen()

        def give() -> None:
            with contextlib.suppress(OSError):  # closed: the service ends
                while True:
                    asking, _ = giver.accept()
                    with asking, contextlib.suppress(OSError):
                        socket.send_fds(asking, [b"."], [listening.fileno()])

        threading.Thread(target=give, name="port", daemon=True).start()
        try:
            yield path
        finally:
            giver.shutdown(socket.SHUT_RDWR)  # wakes `give`


@contextlib.asynccontextmanager
async def answering(app: ASGIApp, path: str) -> AsyncIterator[None]:
    """Answer at the port of `open_port` with the app, on this event loop. Raises OSError where nobody gives it."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(HANDOVER_S)
        asking.connect(path)
        _, descriptors, _, _ = socket.recv_fds(asking, 1, 1)
    if not descriptors:
        raise ConnectionError(f"{path} gave no port: the service ends")
    with socket.socket(fileno=descriptors[0]) as port:
        config = uvicorn.Config(
            app, backlog=BACKLOG, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=GRACE_S
        )
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[port]))
        try:
            yield
        finally:
            server.should_exit = True
            await task
