"""Make HTML documents of the modules in `assets/`: a report that is one file, and the page that `weightd web` serves.

The modules import each other by names such as "weightd/dom.js", which an import map in the document explains: in the
report as data, on the page as addresses. So both run the same files, and nothing is built.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib import resources
from string import Template
from typing import Any, NamedTuple

_ASSETS = resources.files(__package__) / "assets"
_TYPES = {".js": "text/javascript", ".css": "text/css"}
_REPORT_START = 'import "weightd/report.js";'


class Asset(NamedTuple):
    """A file that the page asks for: its type, with the charset left out, and its content."""

    content_type: str
    content: bytes


class WebDocument(NamedTuple):
    """The page of `weightd web`, and the Content-Security-Policy that it is served with."""

    content: bytes
    policy: str


def read_assets() -> dict[str, Asset]:
    """Return the modules and style sheets by name, such as "dom.js"."""
    return {
        entry.name: Asset(_TYPES[suffix], entry.read_bytes())
        for entry in sorted(_ASSETS.iterdir(), key=lambda entry: entry.name)
        for suffix in _TYPES
        if entry.name.endswith(suffix)
    }


def web_document(folder: str) -> WebDocument:
    """Return the page, which finds its assets in `folder`, a path of the server that ends with a slash."""
    modules = _import_map({name: folder + name for name in _modules()})
    content = _template("web.html").substitute(modules=modules, folder=folder)
    policy = (
        f"default-src 'none'; script-src 'self' {_hash(modules)}; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return WebDocument(content.encode(), policy)


def report_html(data: Mapping[str, Any]) -> str:
    """Return the report of a plan as one HTML file, which asks for nothing outside of itself.

    `data` has the keys of `weightd plan --format json`; with, if wanted, `title`, `made_at` (ISO 8601) and `notes`, a
    list of sentences. Sections whose keys are missing are left out.
    """
    modules = _import_map({name: _data_address(asset) for name, asset in _modules().items()})
    style = read_assets()["page.css"].content.decode()
    policy = (
        f"default-src 'none'; script-src data: {_hash(modules)} {_hash(_REPORT_START)}; style-src {_hash(style)}; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return _template("report.html").substitute(
        policy=policy,
        title=html.escape(str(data.get("title", "What sharing would save"))),
        style=style,
        modules=modules,
        report=json.dumps(data).replace("<", "\\u003c"),  # or a name could end the script that holds it
        start=_REPORT_START,
    )


def _modules() -> dict[str, Asset]:
    return {name: asset for name, asset in read_assets().items() if name.endswith(".js")}


def _import_map(addresses: Mapping[str, str]) -> str:
    return json.dumps({"imports": {f"weightd/{name}": address for name, address in addresses.items()}})


def _data_address(asset: Asset) -> str:
    return f"data:{asset.content_type};base64,{base64.b64encode(asset.content).decode()}"


def _hash(text: str) -> str:
    """Return how a Content-Security-Policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _template(name: str) -> Template:
    return Template((_ASSETS / name).read_text())
