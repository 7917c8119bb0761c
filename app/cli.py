"""The command `fovea`: serve, predict, models, check, and the exporter's commands where its extra is installed."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Column, Table

from app import __version__
from app.assembly import open_service
from app.errors import InvalidImage, ServiceError
from app.http.answers import answer_body
from app.http.errors import describe_validation
from app.imaging.decode import SUFFIXES
from app.loaded_model import LoadedModel
from app.log import BackgroundStream, configure
from app.metrics import Metrics, create_registry
from app.quality import Ladder
from app.repository.store import ModelStore
from app.request import LocalRequest, Parameters
from app.service import InferenceService
from app.settings import Settings
from app.types import Prediction

cli = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
STDERR = 2  # its descriptor
out = Console()
err = Console(stderr=True)

Repository = Annotated[Path | None, typer.Option(help="Model repository; unset: FOVEA_REPOSITORY__ROOT, or the embedded one.")]


def main() -> None:
    """Run the command; an error that we know is one line and exit status 1, not a traceback."""
    try:
        cli(prog_name="fovea")
    except ServiceError as error:
        err.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except (ValidationError, SettingsError) as error:
        text = f"{error}: a list, or a section as a whole, is written as JSON"
        if isinstance(error, ValidationError):
            text = describe_validation(error.errors())
        err.print(f"[red]settings:[/] {escape(text)}", soft_wrap=True, highlight=False)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"{__version__}\n")
        raise typer.Exit


@cli.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Image inference made cheap: early exits, INT8 and dynamic batching behind a REST API."""


@cli.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    repository: Repository = None,
) -> None:
    """Serve the REST API until SIGTERM or Ctrl-C."""
    from app.http.application import create_app
    from app.http.server import serve as run_server

    settings = _settings(repository, host=host, port=port)
    app = create_app(settings)
    stream = BackgroundStream(STDERR, app.state.metrics.log_lines_dropped.inc)
    configure(settings.log.level, settings.log.format, stream)
    try:
        run_server(app, settings, lambda url: stream.write(_greeting(url)))
    finally:
        stream.close()


@cli.command()
def predict(
    files: Annotated[list[Path], typer.Argument(exists=True, help="Images, or folders of images.")],
    model: Annotated[str | None, typer.Option(help="Model to use.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 1,
    quality: Annotated[str | None, typer.Option(help="Operating point: full, balanced, or one that the model adds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object per image, one a line.")] = False,
    repository: Repository = None,
) -> None:
    """Classify files without a server, with the same code."""
    settings = _settings(repository)
    configure("warning", settings.log.format)
    paths = list(_images(files))
    if not paths:
        err.print("[red]there are no images in these folders[/]")
        raise typer.Exit(1)
    failed = asyncio.run(_predict(settings, paths, model, top_k, quality, as_json=as_json))
    raise typer.Exit(1 if failed else 0)


@cli.command()
def models(repository: Repository = None, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """List the models of the repository and where they may run."""
    settings = _settings(repository)
    store = ModelStore(settings.repository.root)
    manifests = [store.open(name, version).manifest for name in store.names() for version in store.versions(name)]
    if as_json:
        sys.stdout.write(json.dumps([manifest.model_dump(mode="json") for manifest in manifests], indent=2) + "\n")
        return
    table = Table("model", "version", "classes", "stages", "MMACs by stage", "variants (targets)", "exits")
    for manifest in manifests:
        variants = "; ".join(f"{variant.name} ({', '.join(variant.targets)})" for variant in manifest.variants)
        costs = " + ".join(f"{1000 * stage.gmacs:.1f}" for stage in manifest.stages)
        rungs = [(variant.name, rung) for variant in manifest.variants for rung in Ladder(variant) if rung.certificate]
        proved = "\n".join(f"{variant}, {rung.name}: {rung.bound}" for variant, rung in rungs)
        exits = proved or ("not certified" if len(manifest.stages) > 1 else "")
        sizes = str(manifest.num_classes), str(len(manifest.stages)), costs
        table.add_row(manifest.name, str(manifest.version), *sizes, variants, exits)
    out.print(table)


@cli.command()
def check(repository: Repository = None) -> None:
    """Load every model as the service would: checksums, sessions, warm-up, golden pair, timing; then say what would serve."""
    settings = _settings(repository)
    configure("warning", settings.log.format)

    async def load() -> list[LoadedModel]:
        service = await open_service(settings, Metrics(create_registry()))
        loaded = [model for _, _, model in service.registry.loaded()]
        await service.close()
        return loaded

    for model in asyncio.run(load()):
        name = f"{model.manifest.name} version {model.manifest.version}"
        out.print(
            f"[green]ok[/] {name} on {model.profile.target}: {escape(model.variant_reason)}", soft_wrap=True, highlight=False
        )


# Their options and their help are the exporter's.
_HANDED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@cli.command(context_settings=_HANDED_ON)
def export(context: typer.Context) -> None:
    """Make a published version out of a trained network (needs the `export` extra)."""
    _exporter("export", context.args)


@cli.command(context_settings=_HANDED_ON)
def quantize(context: typer.Context) -> None:
    """Give a published version INT8, or calibrate it anew (needs the `export` extra)."""
    _exporter("quantize", context.args)


@cli.command(context_settings=_HANDED_ON)
def cascade(context: typer.Context) -> None:
    """Put two published models one behind the other (needs the `export` extra)."""
    _exporter("cascade", context.args)


@cli.command(context_settings=_HANDED_ON)
def optimize(context: typer.Context) -> None:
    """Find the fastest way on this machine to lose no more than said (needs the `export` extra)."""
    _exporter("optimize", context.args)


@cli.command(context_settings=_HANDED_ON)
def evaluate(context: typer.Context) -> None:
    """Measure a published version on labelled images (needs the `export` extra)."""
    _exporter("evaluate", context.args)


@cli.command(context_settings=_HANDED_ON)
def report(context: typer.Context) -> None:
    """Write the receipt of a published version: what each operating point costs here (needs the `export` extra)."""
    _exporter("report", context.args)


def _exporter(command: str, arguments: list[str]) -> None:
    try:
        from exporters.cli import app as exporter
    except ModuleNotFoundError as error:
        install = escape("pip install 'fovea[cpu,export]'")
        err.print(f"[red]this needs the package {error.name}:[/] {install}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from error
    exporter([command, *arguments], prog_name="fovea")


def _settings(repository: Path | None, *, host: str | None = None, port: int | None = None) -> Settings:
    """The environment's settings, with what the command line says instead."""
    settings = Settings()
    http: dict[str, Any] = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    changed: dict[str, Any] = {"http": {**settings.http.model_dump(), **http}}
    if repository is not None:
        changed["repository"] = {**settings.repository.model_dump(), "root": repository}
    return Settings.model_validate({**settings.model_dump(), **changed})


def _greeting(url: str) -> str:
    reachable = url.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")  # noqa: S104 - shown, not listened on
    command = f"curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' {shlex.quote(reachable + '/v1/classify')}"
    return f"\nFovea is ready: {reachable}\n{command}\n\n"


def _images(paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        else:
            yield path


async def _predict(
    settings: Settings, paths: list[Path], model: str | None, top_k: int, quality: str | None, *, as_json: bool
) -> int:
    """Classify and show; how many could not be."""
    service = await open_service(settings, Metrics(create_registry()))
    try:
        loaded = service.registry.get(model)
        # Named, so that it is kept: what a long list of files makes of the machine is no reason to answer less well.
        chosen = loaded.ladder[loaded.default_point].name if quality is None else quality
        parameters = Parameters(model=model, top_k=top_k, quality=chosen)
        # Enough to fill batches, few enough to show progress and to be admitted.
        workers = min(2 * settings.batching.max_batch_size, service.admission.max_images)
        answers: list[Prediction | ServiceError | None] = [None] * len(paths)
        queue = iter(enumerate(paths))
        with Progress(console=err, transient=True, disable=len(paths) < 2) as progress:
            task = progress.add_task("classifying", total=len(paths))

            async def work() -> None:
                for index, path in queue:
                    answers[index] = await _classify_file(service, path, parameters)
                    progress.advance(task)

            await asyncio.gather(*(work() for _ in range(workers)))
    finally:
        await service.close()
    results = [(path, answer) for path, answer in zip(paths, answers, strict=True) if answer is not None]
    if as_json:
        _print_json(results)
    else:
        _print_table(results)
    return sum(isinstance(answer, ServiceError) for _, answer in results)


async def _classify_file(service: InferenceService, path: Path, parameters: Parameters) -> Prediction | ServiceError:
    try:
        data = await asyncio.to_thread(path.read_bytes)
    except OSError as error:
        return InvalidImage(f"the file cannot be read: {error.strerror}")
    return (await service.answer(LocalRequest([data], parameters))).results[0]


def _print_json(results: list[tuple[Path, Prediction | ServiceError]]) -> None:
    for path, answer in results:
        body = answer_body(answer)
        sys.stdout.write(json.dumps({"file": str(path), **body}) + "\n")


def _print_table(results: list[tuple[Path, Prediction | ServiceError]]) -> None:
    table = Table(
        Column("file", overflow="fold", ratio=1), "label", "probability", "exit", "decode ms", "compute ms", expand=True
    )
    for path, answer in results:
        if isinstance(answer, ServiceError):
            continue  # below: a sentence in a narrow column reads badly
        labels = "\n".join(escape(score.label) for score in answer.predictions)
        probabilities = "\n".join(f"{score.probability:.3f}" for score in answer.predictions)
        exit_ = f"{answer.exit.stage + 1} of {answer.exit.num_stages}"
        decode, compute = 1000 * answer.timings.decode_s, 1000 * sum(answer.timings.compute_s)
        table.add_row(escape(str(path)), labels, probabilities, exit_, f"{decode:.1f}", f"{compute:.1f}")
    if table.row_count:
        out.print(table)
    for path, answer in results:
        if isinstance(answer, ServiceError):
            out.print(f"{escape(str(path))}: [red]{answer.code}[/]: {escape(str(answer))}", soft_wrap=True, highlight=False)
