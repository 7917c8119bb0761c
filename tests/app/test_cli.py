"""The command `fovea`: what it prints where, its exit status, and errors in one line instead of a traceback."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import structlog

from app import __version__
from app.cli import main
from app.loaded_model import LoadedModel
from models.manifest import MANIFEST_FILE
from tests.images import make_jpeg, make_png, photo, truncated

MODEL = "test_vit"


@dataclass(frozen=True, slots=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


Fovea = Callable[..., Done]


@pytest.fixture
def fovea(
    tiny_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Fovea]:
    """Runs the command in this process, in an empty folder, on the tiny model unless told otherwise."""
    for name in [name for name in os.environ if name.startswith("FOVEA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FOVEA_REPOSITORY__ROOT", str(tiny_repository))
    monkeypatch.setenv("FOVEA_RUNTIME__VARIANT", "fp32")  # so that nothing is timed at load
    monkeypatch.setenv("FOVEA_RUNTIME__INSTANCES", "1")
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level, config = root.handlers[:], root.level, structlog.get_config()

    def run(*arguments: str) -> Done:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["fovea", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        found = capsys.readouterr()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, found.out, found.err)

    yield run
    root.handlers, root.level = handlers, level
    structlog.configure(**config)


def assert_one_line(done: Done, *words: str) -> None:
    """An error for people: one line on standard error, nothing else, and not exit status 0."""
    assert (done.code, done.out) == (1, "")
    (line,) = done.err.splitlines()
    for word in words:
        assert word in line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one of them deeper, a broken one, and what is no image by its name."""
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(make_jpeg(photo(seed=1)))
    (folder / "b.JPG").write_bytes(truncated(make_jpeg(photo(seed=2))))
    (folder / "deeper" / "c.png").write_bytes(make_png(photo(seed=3)))
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_the_version_is_printed_alone(fovea: Fovea) -> None:
    """For scripts."""
    assert Done(0, f"{__version__}\n", "") == fovea("--version")


def test_without_a_command_there_is_help(fovea: Fovea) -> None:
    """That names every command."""
    done = fovea()
    for command in ("serve", "predict", "models", "check", "export", "quantize", "cascade", "optimize", "evaluate", "report"):
        assert command in done.out + done.err


def test_predict_shows_a_table(fovea: Fovea, folder: Path) -> None:
    """File, label, probability, exit; nothing on standard error for a single file."""
    done = fovea("predict", "photos/a.jpg")
    assert (done.code, done.err) == (0, "")
    assert "photos/a.jpg" in done.out
    assert "of 3" in done.out
    for column in ("file", "label", "probability", "exit"):
        assert column in done.out


def test_predict_json_is_a_line_per_image_and_nothing_else(fovea: Fovea, folder: Path) -> None:
    """Of folders the images, sorted, whatever the case of their names; progress is not on standard output."""
    done = fovea("predict", "--json", "--top-k", "3", "photos")
    results = [json.loads(line) for line in done.out.splitlines()]
    assert [result["file"] for result in results] == ["photos/a.jpg", "photos/b.JPG", "photos/deeper/c.png"]
    assert done.code == 1  # one of them is broken
    assert [list(result)[1] for result in results] == ["predictions", "error", "predictions"]
    assert results[1]["error"]["code"] == "invalid_image"
    for result in (results[0], results[2]):
        assert len(result["predictions"]) == 3
        assert result["exit"]["stages"] == 3
        assert result["timings_ms"]["total"] > 0


def test_a_broken_file_among_good_ones_is_told_in_its_row(fovea: Fovea, folder: Path) -> None:
    """The others are answered; the exit status says that not all were."""
    done = fovea("predict", "photos")
    assert done.code == 1
    assert done.out.count("of 3") == 2
    assert "invalid_ima" in done.out
    assert "Traceback" not in done.out + done.err


def test_a_file_that_cannot_be_read_is_told_in_its_row(fovea: Fovea, folder: Path) -> None:
    """Permissions, or a disk that fails: an error beside the file."""
    unreadable = Path("/proc/self/mem")
    if not unreadable.exists():
        pytest.skip("needs Linux's /proc")
    done = fovea("predict", "--json", str(unreadable), "photos/a.jpg")
    bad, good = (json.loads(line) for line in done.out.splitlines())
    assert (done.code, bad["error"]["code"]) == (1, "invalid_image")
    assert "cannot be read" in bad["error"]["detail"]
    assert good["predictions"]


@pytest.mark.parametrize("name", ["a[b]c.jpg", "a[/b]c.jpg", "[red]x.jpg", "photo[1].jpg"])
def test_a_file_name_is_shown_as_it_is(fovea: Fovea, tmp_path: Path, name: str) -> None:
    """Brackets are not markup."""
    if "/" in name:
        (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(make_jpeg())
    done = fovea("predict", name)
    assert done.code == 0
    assert name in done.out


def test_predict_sends_no_more_at_once_than_is_admitted(fovea: Fovea, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the least limit that may be set, every file is answered."""
    monkeypatch.setenv("FOVEA_LIMITS__MAX_IN_FLIGHT", "2")
    monkeypatch.setenv("FOVEA_BATCHING__MAX_BATCH_SIZE", "2")
    monkeypatch.setenv("FOVEA_HTTP__MAX_IMAGES_PER_REQUEST", "2")
    for number in range(9):
        (tmp_path / f"{number}.jpg").write_bytes(make_jpeg())
    done = fovea("predict", "--json", ".")
    assert done.code == 0
    assert len(done.out.splitlines()) == 9


def test_a_folder_without_images_is_an_error(fovea: Fovea, tmp_path: Path) -> None:
    """Not an empty success."""
    (tmp_path / "empty").mkdir()
    assert_one_line(fovea("predict", "empty"), "no images")


def test_a_file_that_is_not_there_is_an_error(fovea: Fovea) -> None:
    """Of usage, as the shell knows it."""
    done = fovea("predict", "nowhere.jpg")
    assert done.code == 2
    assert "nowhere.jpg" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "nobody"), ("error:", "'nobody'", MODEL)),
        (("--top-k", "11"), ("error:", "top_k", "between 1 and 10")),
    ],
)
def test_a_wrong_option_is_an_error_in_words(
    fovea: Fovea, folder: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    """The same sentence that the service answers."""
    assert_one_line(fovea("predict", *arguments, "photos/a.jpg"), *words)


def test_models_lists_what_the_repository_holds(fovea: Fovea, tiny_repository: Path) -> None:
    """As a table, or the manifests as JSON."""
    done = fovea("models")
    assert (done.code, done.err) == (0, "")
    assert MODEL in done.out
    assert "fp32" in done.out
    done = fovea("models", "--json")
    (manifest,) = json.loads(done.out)
    on_disk = json.loads((tiny_repository / MODEL / "1" / MANIFEST_FILE).read_text())
    assert (MODEL, 1, on_disk["files"]) == (manifest["name"], manifest["version"], manifest["files"])


def test_check_says_what_would_serve_and_why(fovea: Fovea) -> None:
    """In one line per model."""
    done = fovea("check")
    assert (done.code, done.err) == (0, "")
    (line,) = done.out.splitlines()
    for word in ("ok", MODEL, "version 1", "fp32"):
        assert word in line


@pytest.mark.parametrize("command", ["check", "models", "serve"])
def test_a_damaged_model_is_an_error_in_one_line(fovea: Fovea, tiny_repository: Path, tmp_path: Path, command: str) -> None:
    """That names the file and what to do."""
    shutil.copytree(tiny_repository, tmp_path / "damaged")
    with (tmp_path / "damaged" / MODEL / "1" / "fp32" / "stage_1.onnx").open("ab") as file:
        file.write(b"x")
    port = ("--port", "0") if command == "serve" else ()
    done = fovea(command, "--repository", str(tmp_path / "damaged"), *port)
    assert_one_line(done, "error:", "fp32/stage_1.onnx", "fetch it again")


@pytest.mark.parametrize("command", ["check", "serve", "predict"])
def test_an_empty_repository_is_an_error_in_one_line(fovea: Fovea, tmp_path: Path, folder: Path, command: str) -> None:
    """That says where it looked and which setting says so."""
    (tmp_path / "empty").mkdir()
    arguments = {"check": [], "serve": ["--port", "0"], "predict": ["photos/a.jpg"]}[command]
    done = fovea(command, "--repository", str(tmp_path / "empty"), *arguments)
    assert_one_line(done, "error:", str(tmp_path / "empty"), "FOVEA_REPOSITORY__ROOT")


def test_half_a_copy_is_an_error_in_one_line(fovea: Fovea, tiny_repository: Path, tmp_path: Path) -> None:
    """That names what is missing."""
    shutil.copytree(tiny_repository, tmp_path / "half")
    (tmp_path / "half" / MODEL / "1" / "golden.npz").unlink()
    assert_one_line(fovea("check", "--repository", str(tmp_path / "half")), "error:", "golden.npz", "No such file")


@pytest.mark.parametrize("command", ["check", "serve"])
def test_a_model_that_does_not_compute_as_exported_is_an_error_in_one_line(
    fovea: Fovea, tiny_repository: Path, tmp_path: Path, command: str
) -> None:
    """The golden pair finds out: here it remembers other logits than the files give."""
    directory = tmp_path / "other" / MODEL / "1"
    shutil.copytree(tiny_repository, tmp_path / "other")
    with np.load(directory / "golden.npz") as stored:
        golden = {name: array + 1 if name.endswith("logits") else array for name, array in stored.items()}
    np.savez(directory / "golden.npz", **golden)
    body = orjson.loads((directory / MANIFEST_FILE).read_bytes())
    body["files"]["golden.npz"] = hashlib.sha256((directory / "golden.npz").read_bytes()).hexdigest()
    (directory / MANIFEST_FILE).write_bytes(orjson.dumps(body))
    port = ("--port", "0") if command == "serve" else ()
    done = fovea(command, "--repository", str(tmp_path / "other"), *port)
    assert_one_line(done, "error:", "stage 0", "golden pair", "differ")


def test_a_target_that_is_not_here_is_an_error_in_one_line(fovea: Fovea, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never a silent fall-back to another."""
    monkeypatch.setenv("FOVEA_RUNTIME__TARGET", "tensorrt")
    assert_one_line(fovea("check"), "error:", "tensorrt", "FOVEA_RUNTIME__TARGET")


def test_a_manifest_that_is_none_is_an_error_in_words(fovea: Fovea, tiny_repository: Path, tmp_path: Path) -> None:
    """With what is wrong in it."""
    shutil.copytree(tiny_repository, tmp_path / "damaged")
    manifest = tmp_path / "damaged" / MODEL / "1" / MANIFEST_FILE
    manifest.write_bytes(orjson.dumps({**orjson.loads(manifest.read_bytes()), "stages": 3}))
    done = fovea("check", "--repository", str(tmp_path / "damaged"))
    assert (done.code, done.out) == (1, "")
    assert "manifest" in done.err
    assert "stages" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("FOVEA_HTTP__PORT", "abc", ("http.port", "integer")),
        ("FOVEA_HTTP__PORT", "70000", ("http.port", "65535")),
        ("FOVEA_HTTP", "no JSON", ("http", "as JSON")),
        ("FOVEA_HTTP__PROT", "8000", ("http.prot",)),
        ("FOVEA_LIMITS__MAX_IN_FLIGHT", "1", ("max_in_flight", "could never be")),
        ("FOVEA_LOG__LEVEL", "loud", ("log.level", "'debug'")),
        ("FOVEA_REPOSITORY__MODELS", "vit", ("repository", "as JSON")),
    ],
)
def test_a_setting_that_cannot_work_is_told_by_name(
    fovea: Fovea, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: tuple[str, ...]
) -> None:
    """One line, whichever the command."""
    monkeypatch.setenv(name, value)
    assert_one_line(fovea("serve"), "settings:", *words)
    assert_one_line(fovea("models"), "settings:", *words)


def test_a_setting_of_the_command_line_is_checked_too(fovea: Fovea) -> None:
    """It stands above the environment's."""
    assert_one_line(fovea("serve", "--port", "70000"), "settings:", "http.port", "65535")


def test_a_variant_that_is_not_there_is_an_error_in_words(fovea: Fovea, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told at start, with those there are."""
    monkeypatch.setenv("FOVEA_RUNTIME__VARIANT", "fp8")
    assert_one_line(fovea("check"), "error:", "'fp8'", "fp32")


def test_exporting_without_torch_says_what_to_install(fovea: Fovea, monkeypatch: pytest.MonkeyPatch) -> None:
    """The serving environment has none."""
    for name in [name for name in sys.modules if name.partition(".")[0] in {"torch", "exporters"}]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_one_line(fovea("export", "--model", MODEL), "torch", "pip install 'fovea[cpu,export]'")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("export", "--weights"),
        ("quantize", "--from"),
        ("cascade", "--dear"),
        ("optimize", "--shares"),
        ("evaluate", "--diagram"),
        ("report", "--out"),
    ],
)
def test_the_exporters_commands_hand_their_options_on(fovea: Fovea, command: str, option: str) -> None:
    """To the exporter, whose help it is."""
    done = fovea(command, "--help")
    assert done.code == 0
    assert option in done.out


@pytest.mark.parametrize(("arguments", "quality"), [((), "balanced"), (("--quality", "full"), "full")])
def test_many_files_are_answered_at_the_quality_that_was_asked_for(
    fovea: Fovea, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], quality: str
) -> None:
    """However long the list: nobody else waits, so nothing is to be bent for."""
    chosen = LoadedModel.choose
    named: list[str | None] = []

    def choose(model: LoadedModel, quality: str | None = None, *rest: Any, **options: Any) -> object:
        named.append(quality)
        return chosen(model, quality, *rest, **options)

    monkeypatch.setattr(LoadedModel, "choose", choose)
    fovea("predict", str(folder), *arguments)
    assert named
    assert set(named) == {quality}
