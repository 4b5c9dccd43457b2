"""`--local`: all experts in the router's own process. For one device, and the reference for the mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from model.experts import ExpertWeights
from model.kernels import Kernels
from model.moe import LocalExchange


class LocalSteps(LocalExchange):
    """A LocalExchange with the engine's step hooks, which have nothing to do here."""

    num_lanes = 1

    def __init__(self, experts: Mapping[tuple[int, int], ExpertWeights], kernels: Kernels | None = None) -> None:
        super().__init__(experts, kernels)
        self.while_waiting: Callable[[], None] = lambda: None
        self.recovery_s = 0.0

    def begin_step(self) -> None:
        return None

    def idle(self) -> None:
        return None

    def close(self) -> None:
        return None
