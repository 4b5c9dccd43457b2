"""Environments for programs whose dependencies must not meet ours: made by pip inside ours, and kept."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ENVIRONMENTS = Path(sys.prefix) / "clients"


def environment(name: str, wanted: Sequence[str]) -> Path:
    """The Python of an environment that has these requirements. Raises CalledProcessError when pip can't."""
    folder = ENVIRONMENTS / name
    stamp = folder / ".installed"
    if not stamp.exists() or stamp.read_text().splitlines() != list(wanted):
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *wanted], check=True)
        stamp.write_text("\n".join(wanted))
    return folder / "bin" / "python"
