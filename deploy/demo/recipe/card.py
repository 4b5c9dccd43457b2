"""Tables of the model card, each between marks of its own."""

from pathlib import Path


def write_table(card: Path, name: str, lines: list[str]) -> None:
    """Put the lines in the place of what is between `<!-- name: begin -->` and `<!-- name: end -->`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found_begin, rest = card.read_text("utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{card} has no lines {begin} and {end} for the table to go between; add them")
    card.write_text("\n".join([before + begin, *lines, end + after]), "utf-8")
