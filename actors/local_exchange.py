"""`--local`: all experts in the router's own process. For one device, and the reference for the mesh."""

from __future__ import annotations

from model.moe import LocalExchange


class LocalSteps(LocalExchange):
    """A LocalExchange with the engine's step hooks, which have nothing to do here."""

    def begin_step(self) -> None:
        return None

    def idle(self) -> None:
        return None

    def close(self) -> None:
        return None
