"""What the README shows is true: its commands run, its answer has the form of a real one."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.http.schemas import ClassifyResponse
from tests.bench.processes import Server
from tests.images import make_jpeg

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def test_the_answer_shown_has_the_form_of_a_real_one() -> None:
    """The JSON example validates against the schema, exactly."""
    (example,) = [text for language, text in BLOCKS if language == "json"]
    parsed = ClassifyResponse.model_validate_json(example)

    assert json.loads(example) == parsed.model_dump(exclude_unset=True)


def test_the_commands_shown_exist() -> None:
    """Every `make` target and every `fovea` command with its options."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"serve", "test"} <= set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets
    for line in re.findall(r"^fovea (.*?)\s*(?:#.*)?$", README, flags=re.MULTILINE):
        command, *words = shlex.split(line)
        result = CliRunner().invoke(cli, [command, "--help"])
        assert result.exit_code == 0, command
        for option in [word for word in words if word.startswith("--") and word != "--help"]:
            assert option in result.output


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_lines_work_against_the_embedded_model(tmp_path: Path) -> None:
    """Each as it stands, but for the port."""
    for name in ("photo.jpg", "a.jpg", "b.png"):
        (tmp_path / name).write_bytes(make_jpeg())
    lines = re.findall(r"curl [^\n`]*", README)
    assert len(lines) == 2
    with Server() as server:
        address = server.classify_url.removesuffix("/v1/classify")
        for line in lines:
            command = line.replace("http://127.0.0.1:8000", address)
            answer = subprocess.run(shlex.split(command), cwd=tmp_path, capture_output=True, check=True).stdout
            results = ClassifyResponse.model_validate_json(answer).results
            assert all(result.predictions for result in results)
            assert len(results) == line.count("@")
