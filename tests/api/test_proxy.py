"""The server behind nginx, configured as docs/operations.md says."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urljoin

import httpx2
import pytest

from gptcore.procs import die_with_parent
from tests.api.server import Server, train_spec
from tests.conftest import free_port, wait_until
from trainmaster import Client
from worker.keyring import KeyRing
from worker.settings import Settings

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
DOCS = Path(__file__).parents[2] / "docs" / "operations.md"
STATIC = Path(__file__).parents[2] / "api" / "static"
PUBLIC = "https://box.example"
CONFIGURATION = """
daemon off;
pid {folder}/pid;
error_log {folder}/log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        {location}
        location / {{ proxy_pass {server}/; }}  # with a Host of its own
    }}
}}
"""

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


@pytest.fixture
def proxy(settings: Settings, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """nginx in front of a server → its URL, and a key of the server."""
    key = KeyRing(settings.redis_url, settings.home).create("me", "admin")[1]
    public = replace(settings, url=f"{PUBLIC}/trainmaster", hosts=("other.example",))
    location = re.findall(r"```nginx\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)[0]
    with Server(public) as server:
        port, file = free_port(), tmp_path / "nginx.conf"
        location = location.replace("http://127.0.0.1:8000", server.url)
        file.write_text(CONFIGURATION.format(folder=tmp_path, port=port, location=location, server=server.url))
        nginx = subprocess.Popen(
            [str(NGINX), "-c", str(file), "-p", str(tmp_path)], preexec_fn=lambda: die_with_parent()
        )
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: _answers(url))
            yield url, key
        finally:
            nginx.terminate()
            nginx.wait(20)


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/healthz", trust_env=False).is_success
    except httpx2.TransportError:
        return False


def test_the_page_and_its_requests_go_through_a_proxy_with_a_path_of_its_own(proxy: tuple[str, str]) -> None:
    url, key = proxy
    page_url = f"{url}/trainmaster/"
    authorized = {"Authorization": f"Bearer {key}"}
    with httpx2.Client(trust_env=False, headers={"Host": "box.example"}) as http:
        redirected = http.get(page_url.rstrip("/"))
        assert redirected.status_code == 301 and redirected.headers["Location"].endswith("/trainmaster/")
        page = http.get(page_url)
        assert page.is_success and "Trainmaster" in page.text
        parts = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
        assert len(parts) > 5
        for part in [*parts, "openapi.json"]:
            assert urljoin(page_url, part).startswith(page_url), part
            assert http.get(urljoin(page_url, part)).is_success, part
        assert "'openapi.json'" in http.get(f"{page_url}docs").text
        assert http.get(f"{page_url}jobs").status_code == 401  # a proxy is not this machine
        for host in ("box.example", "other.example"):
            headers = {**authorized, "Host": host, "Origin": f"https://{host}"}
            made = http.post(f"{page_url}jobs", json=train_spec(), headers=headers)
            assert made.status_code == 201 and "/trainmaster/jobs/job-" in made.headers["Location"], made.text
        foreign = http.get(f"{page_url}jobs", headers={**authorized, "Host": "evil.example"})
        assert foreign.status_code == 403 and "TRAINMASTER_HOSTS" in foreign.json()["detail"]
        routes = http.get(f"{page_url}openapi.json").json()["paths"]
    own = {route.split("/")[1] for route in routes if route != "/"} | {"static"}
    roots = "|".join(own - {"metrics"})  # in the page, "/metrics" is the end of a run's URL
    for script in STATIC.glob("*.js"):
        if script.name != "uplot.min.js":
            absolute = re.findall(rf"""["'`]/(?:{roots})\b[^"'`]*""", script.read_text("utf-8"))
            assert absolute == [], script


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Box.example/trainmaster", "https://box.example"),
        ("https://box.example:443", "https://box.example"),
        ("http://box.example:8443/", "http://box.example:8443"),
        ("http://[2001:db8::1]:80", "http://[2001:db8::1]"),
        ("http://127.0.0.1:8000", ""),
        ("http://[broken", ""),
    ],
)
def test_the_public_origin_is_what_a_browser_sends(url: str, origin: str, settings: Settings) -> None:
    assert replace(settings, url=url).public_origin == origin


def test_a_proxy_that_rewrites_the_host_serves_the_page_under_the_url_alone(proxy: tuple[str, str]) -> None:
    url, key = proxy
    with httpx2.Client(base_url=url, trust_env=False, headers={"Authorization": f"Bearer {key}"}) as http:
        assert http.post("/jobs", json=train_spec(), headers={"Origin": PUBLIC}).status_code == 201
        for origin in ("https://evil.example", "http://box.example", "https://box.example:444", "null"):
            refused = http.post("/jobs", json=train_spec(), headers={"Origin": origin})
            assert refused.status_code == 403 and "set TRAINMASTER_URL" in refused.json()["detail"]


def test_the_client_follows_a_job_through_a_proxy(proxy: tuple[str, str]) -> None:
    url, key = proxy
    with Client(f"{url}/trainmaster", key) as client:
        job = client.submit(train_spec())
        client.cancel(job["id"])
        assert [event["to_status"] for event in client.events(job["id"])] == ["queued", "cancelled"]
