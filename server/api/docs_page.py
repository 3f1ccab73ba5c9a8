"""``/docs``: the API in a browser, from files of an installed package and nothing of elsewhere."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

DOCS_PATH = "/docs"
# It carries Swagger UI; its own app class is not used.
_PACKAGE = "fastapi_offline"
# The page has a script of its own that starts Swagger UI; it may load from this service only.
_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'"
)


def add_docs_page(app: FastAPI) -> None:
    """Serve the page, where the package with its files is installed (extra ``server``)."""
    spec = find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return
    files = StaticFiles(directory=Path(spec.origin).parent / "static")

    @app.get(DOCS_PATH, include_in_schema=False)
    async def docs() -> Response:
        # Relative, so that they hold below any prefix.
        page = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon.png",
            # Or it would ask a site of elsewhere what it thinks of the document.
            swagger_ui_parameters={"validatorUrl": None},
        )
        page.headers["Content-Security-Policy"] = _POLICY
        return page

    app.mount(DOCS_PATH, files)
