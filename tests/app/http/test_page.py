"""The pages and their files: everything from here, and nothing else allowed."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import pytest

from app.http.routes.page import STATIC
from tests.app.http.served import Served

pytestmark = pytest.mark.anyio

OUTSIDE = re.compile(r"""(?:https?:)?//[\w.-]+\.\w+""")
# Never fetched: names of XML dialects, and comments.
HARMLESS = re.compile(r"http://www\.w3\.org/\S+|^\s*(?://|\*|/\*).*$|(?<=;)\s*//.*$", re.MULTILINE)
PAGES = {"/": "text/html", "/docs": "text/html"}


class References(HTMLParser):
    """What a page loads or leads to, and what of it stands in the page itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.inline: list[str] = []
        self._inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in {"href", "src", "action"} and value:
                self.addresses.append(value)
            if name == "style" or name.startswith("on"):
                self.inline.append(name)
        self._inside = tag if tag in {"script", "style"} else None

    def handle_data(self, data: str) -> None:
        if self._inside and data.strip():
            self.inline.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = None


def assert_closed(headers: dict[str, str]) -> None:
    """The headers by which a browser loads nothing from elsewhere, whatever the page says."""
    policy = {directive.split()[0]: directive.split()[1:] for directive in headers["content-security-policy"].split(";")}
    assert policy["default-src"] == ["'self'"]
    assert policy["frame-ancestors"] == ["'none'"]
    assert not {"'unsafe-inline'", "'unsafe-eval'", "*", "https:"} & {word for words in policy.values() for word in words}
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_and_all_that_it_refers_to_are_served_from_here(served: Served, path: str) -> None:
    """Every address leads to an answer of ours, and nothing stands inline where the policy would forbid it."""
    page = await served.client.get(path)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith(PAGES[path])
    assert_closed(dict(page.headers))
    references = References(page.text)
    assert references.inline == []
    assert len(references.addresses) >= 4
    for address in references.addresses:
        whole = urljoin(f"http://fovea{path}", address)
        assert urlsplit(whole).hostname == "fovea", address
        assert (await served.client.get(whole)).status_code == 200, address


@pytest.mark.parametrize("name", sorted(path.name for path in STATIC.iterdir()))
async def test_a_file_names_no_other_host(served: Served, name: str) -> None:
    """No font, script, picture or counter from elsewhere."""
    response = await served.client.get(f"/static/{name}")
    assert response.status_code == 200
    assert_closed(dict(response.headers))
    assert OUTSIDE.findall(HARMLESS.sub("", response.text)) == []


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        *((f"/static/{path.name}", "javascript") for path in STATIC.glob("*.js")),
        ("/static/page.css", "text/css"),
        ("/static/favicon.svg", "image/svg+xml"),
        ("/static/swagger/swagger-ui.css", "text/css"),
        ("/static/swagger/swagger-ui-bundle.js", "javascript"),
    ],
)
async def test_a_file_says_what_it_is_and_can_be_kept(served: Served, path: str, media_type: str) -> None:
    """With `nosniff` a wrong type would not be run; an unchanged file is not sent again."""
    response = await served.client.get(path)
    assert response.status_code == 200
    assert media_type in response.headers["content-type"]
    assert_closed(dict(response.headers))
    again = await served.client.get(path, headers={"if-none-match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


async def test_the_page_calls_routes_that_exist(served: Served) -> None:
    """A renamed route would only be noticed in a browser."""
    script = "".join(path.read_text() for path in STATIC.glob("*.js"))
    called = set(re.findall(r"""["'`](v1/[\w/]+)""", script))
    assert {"v1/classify", "v1/models"} <= called
    routes = (await served.client.get("/openapi.json")).json()["paths"]
    assert {f"/{path}" for path in called} <= set(routes)


async def test_the_api_page_with_a_slash_leads_to_the_one_without(served: Served) -> None:
    """Its links are relative; and so is the redirect, so that it works behind a proxy that speaks https."""
    response = await served.client.get("/docs/")
    assert (response.status_code, response.headers["location"]) == (307, "../docs")
    assert (await served.client.get("/docs/", follow_redirects=True)).url.path == "/docs"
