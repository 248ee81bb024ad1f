"""`GET /`: in which form it answers, and that nothing in it is taken for more than text."""

import re

import httpx
import pytest

from service.http.front_page import as_html, front_page
from tests.service.fakes import AppClient

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
HTML, JSON = "text/html; charset=utf-8", "application/json"


def get(client: AppClient, *accept: str) -> httpx.Response:
    headers = [("Accept", value) for value in accept]
    return client.request("GET", "/", headers=headers)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (BROWSER, HTML),
        ("text/html", HTML),
        ("TEXT/HTML", HTML),
        ("text/*", HTML),
        ("text/html;level=1;q=0.5", HTML),
        ("text/html, application/json;q=0.9", HTML),
        ("application/json;q=0.1, text/*;q=0.2", HTML),
        ("*/*;q=0.1, text/html", HTML),
        ("*/*, application/json;q=0", HTML),
        ("*/*", JSON),
        ("", JSON),
        ("application/json", JSON),
        ("text/html;q=0.5, application/json", JSON),
        ("text/html, application/json", JSON),
        ("text/html;q=0.2, */*;q=0.3", JSON),
        ("text/html;q=0, */*", JSON),
        ("text/html;q=0.1, text/*;q=0.9, application/json;q=0.5", JSON),
        ("image/png", JSON),
        ("text/html;q=nonsense", JSON),
        ("text/html;q=nan", JSON),
        (",;,q=1;;text", JSON),
    ],
)
def test_the_form_is_what_the_client_would_rather_have_and_json_where_it_does_not_mind(
    client: AppClient, accept: str, form: str
) -> None:
    response = get(client, accept)
    assert response.status_code == 200
    assert response.headers["content-type"] == form
    assert response.headers["vary"] == "Accept"


def test_a_client_that_says_nothing_gets_json_and_two_lines_are_one(client: AppClient) -> None:
    del client.http.headers["accept"]
    assert get(client).headers["content-type"] == JSON
    assert get(client, "application/json;q=0.5", "text/html").headers["content-type"] == HTML


def test_it_says_what_is_served_and_every_link_leads_somewhere(client: AppClient) -> None:
    page = get(client, JSON).json()
    manifest = client.served.manifest
    assert (page["policy"], page["policy_version"]) == (manifest.name, manifest.policy_version)
    assert "POST /act" in page["summary"]
    html = get(client, "text/html").text
    assert re.findall('href="([^"]*)"', html) == list(page["links"].values())
    for text in (page["summary"], page["policy"], page["policy_version"]):
        assert text in html
    for path in page["links"].values():
        assert client.get(path).status_code == 200


def test_links_lead_through_a_proxys_prefix(client: AppClient) -> None:
    client.app.root_path = "/tamiyo"
    page = get(client, JSON).json()
    assert "POST /tamiyo/act" in page["summary"]
    assert page["links"]["documentation"] == "/tamiyo/docs"
    assert 'href="/tamiyo/docs"' in get(client, "text/html").text


def test_an_artifact_s_name_and_a_prefix_are_text_in_html() -> None:
    html = as_html(front_page("<script>alert('{name}')</script>", 'sha256:"&', '/"><b>'))
    assert "<script" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;alert(&#x27;{name}&#x27;)&lt;/script&gt;" in html
