"""`GET /`: what this is and where to go, for whoever has only the address."""

from html import escape

from fastapi import Request, Response

from service.http.accept import quality
from service.http.schemas import FrontPage

LINKS = {
    "documentation": "/docs",
    "openapi": "/openapi.json",
    "policy": "/policy",
    "health": "/healthz",
    "readiness": "/readyz",
    "metrics": "/metrics",
}
HTML = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>tamiyo-serve</title></head>
<body>
<h1>tamiyo-serve</h1>
<p>{summary}</p>
<p>Policy: {policy}, <code>{policy_version}</code></p>
<ul>
{links}
</ul>
</body>
</html>
"""


def front_page(name: str, policy_version: str, prefix: str = "") -> FrontPage:
    """The page of one policy, with links below a proxy's path `prefix`."""
    return FrontPage(
        service="tamiyo-serve",
        summary=f"POST {prefix}/act takes one step of one environment, or of many.",
        policy=name,
        policy_version=policy_version,
        links={link: prefix + path for link, path in LINKS.items()},
    )


def respond(page: FrontPage, request: Request) -> Response:
    """HTML where the client would rather have it, as browsers say they would, else JSON."""
    accept = ",".join(request.headers.getlist("accept")) or "*/*"
    headers = {"Vary": "Accept"}
    if quality(accept, "text/html") > quality(accept, "application/json"):
        return Response(as_html(page), media_type="text/html", headers=headers)
    content = page.model_dump_json(indent=2) + "\n"
    return Response(content, media_type="application/json", headers=headers)


def as_html(page: FrontPage) -> str:
    """For browsers."""
    # The policy's name is the artifact's word.
    links = "\n".join(
        f'<li><a href="{escape(path)}">{escape(name)}</a></li>' for name, path in page.links.items()
    )
    texts = {name: escape(getattr(page, name)) for name in ("summary", "policy", "policy_version")}
    return HTML.format(links=links, **texts)
