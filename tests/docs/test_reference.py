"""The reference pages name everything there is."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase

from app import errors
from app.http.errors import STATUSES
from app.metrics import Metrics
from app.settings import Settings

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_every_setting_is_documented_with_its_meaning() -> None:
    """Variable and description, word for word."""
    page = (DOCS / "settings.md").read_text()
    for section, field in Settings.model_fields.items():
        for name, setting in field.annotation.model_fields.items():
            assert f"`FOVEA_{section.upper()}__{name.upper()}`" in page
            assert setting.description in page


def test_every_metric_is_documented_with_its_help() -> None:
    """Name as scraped, and help."""
    page = (DOCS / "metrics.md").read_text()
    metrics = [value for value in vars(Metrics(CollectorRegistry())).values() if isinstance(value, MetricWrapperBase)]
    assert len(metrics) > 10
    for metric in metrics:
        assert metric._name in page
        assert metric._documentation in page


def test_every_error_code_has_a_status_and_a_line_in_the_docs() -> None:
    """Also those that only the start can meet."""
    page = (DOCS / "errors.md").read_text()
    leaves = [cls for cls in vars(errors).values() if isinstance(cls, type) and not cls.__subclasses__()]
    codes = {cls.code for cls in leaves if issubclass(cls, errors.ServiceError)}
    assert codes <= set(STATUSES)
    for code, (status, _) in STATUSES.items():
        assert f"| `{code}` | {status} |" in page


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_between_pages_lead_somewhere(page: str) -> None:
    """Relative links name files that exist."""
    import re

    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", (DOCS / page).read_text()):
        if "://" not in link:
            assert (DOCS / link).exists(), link
