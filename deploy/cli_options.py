"""Options that several commands share, and how a command fails."""

from __future__ import annotations

from typing import Annotated, NoReturn
from urllib.parse import quote

import typer

Url = Annotated[str, typer.Option(envvar="EXPERTMESH_URL", help="Where the service is.")]
ApiKey = Annotated[str | None, typer.Option(envvar="EXPERTMESH_API_KEY", help="Key to show to the service.")]
Model = Annotated[str | None, typer.Option(help="Model; the first that is served when left out.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens to write.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens with this much probability.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same tokens.")]
MeshModel = Annotated[str | None, typer.Option("--model", help="A model of the mesh, where there are several.")]
LOCAL_URL = "http://127.0.0.1:8000"


def mesh_path(model: str | None) -> str:
    """GET /mesh of a model, or of the first."""
    return f"/mesh?model={quote(model)}" if model else "/mesh"


def fail(message: str) -> NoReturn:
    """One red line, exit code 1."""
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(1)
