"""'dapt serve' and its clients: below a path, other bodies and origins, and slow or greedy ones."""

import base64
import contextlib
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urljoin

import pytest
import test_serve
from patience import LONG, until
from test_serve import Client, form, ranking, running
from typer.testing import CliRunner

from dapt.cli import app
from dapt.serve import server
from dapt.serve.app import Limits

run, served = test_serve.run, test_serve.served


@pytest.fixture(scope="module")
def client(served):
    with running(served) as client:
        yield client


@pytest.fixture(scope="module")
def photo(photo_folder):
    return sorted((photo_folder / "test").rglob("*.png"))[0].read_bytes()


# -- below a path ----------------------------------------------------------------------------------


def links(page):
    return re.findall(r'(?:href|src)="([^"#]+)"', page.body.decode())


@pytest.mark.parametrize("page", ["", "docs"])
@pytest.mark.parametrize("told", [{}, {"X-Forwarded-Prefix": "/clip"}])
def test_pages_work_below_a_path_that_a_proxy_takes_off(client, page, told):
    place = f"http://photos.example/clip/{page}"
    found = links(client.get(f"/{page}", **told))
    assert len(found) >= 4
    for link in found:
        whole = urljoin(place, link)
        assert whole.startswith("http://photos.example/clip/")
        below = whole.removeprefix("http://photos.example/clip")
        assert client.get(below, **told).status == 200, link
    for script in ("page.js", "docs.js"):
        text = client.get(f"/static/{script}").body.decode()
        assert not [word for word in ('fetch("/', 'request("/', "request(`/") if word in text]


def test_pages_work_below_a_path_that_a_proxy_leaves(served, photo):
    with running(served, root_path="/clip") as client:
        for page in ("/clip", "/clip/", "/clip/docs"):
            found = client.get(page)
            assert found.status == 200
            assert b'<base href="/clip/">' in found.body
        for path in ("/clip/static/page.js", "/clip/classes", "/clip/healthz", "/healthz"):
            assert client.get(path).status == 200, path
        for path in ("/clipper/healthz", "/clip/clip/healthz", "/clip/nowhere"):
            assert client.get(path).status == 404, path
        assert client.get("/clip/openapi.json").json["servers"] == [{"url": "/clip"}]
        kind, body = form([("images", "a.png", photo)])
        found = client.ask("POST", "/clip/predict?nearest=1", body, **{"Content-Type": kind})
        image = found.json["predictions"][0]["nearest"][0]["image"]
        assert image.startswith("/clip/support/")
        assert client.get(image).headers["content-type"] == "image/jpeg"
        assert client.metric('dapt_requests_total{path="/healthz",status="200"}') == 2


def test_a_told_path_is_one_or_none(client, photo):
    """It stands in links alone, and as nothing else."""
    for told in ('/a"><script>', "//evil.example", "http://evil.example", "a", "/..", "/a/../b"):
        assert b"<base" not in client.get("/", **{"X-Forwarded-Prefix": told}).body, told
    found = client.predict(photo, query="?nearest=1", **{"X-Forwarded-Prefix": "/a/b"})
    assert found.json["predictions"][0]["nearest"][0]["image"].startswith("/a/b/support/")
    for path in ("/predict", "/static/page.js", "/healthz"):
        told = {"X-Forwarded-Prefix": path}
        assert client.get("/healthz", **told).status == 200


def test_a_token_is_asked_for_below_a_path(served):
    with running(served, token="right", root_path="/clip") as client:
        for path in ("/clip/classes", "/classes", "/clip/static/../classes"):
            assert client.get(path).status in (401, 404), path
        assert client.get("/clip/classes", **{"X-Forwarded-Prefix": "/static"}).status == 401
        assert client.get("/classes", **{"X-Forwarded-Prefix": "/static/x"}).status == 401
        assert client.get("/clip/classes", Authorization="Bearer right").status == 200


@pytest.mark.parametrize(
    ("path", "to"),
    [("/docs/", "../docs"), ("/predict/?top=2", "../predict?top=2"), ("/healthz/", "../healthz"),
     ("/nowhere/", None), ("//evil.example/", None), ("/%0d%0aa:b/", None), ("/static/", None)],
)  # fmt: skip
def test_a_slash_too_many_leads_to_what_is_meant(client, path, to):
    found = client.get(path)
    assert (found.status, found.headers.get("location")) == (307 if to else 404, to)


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/healthz", "/classes", "/metrics", "/openapi.json", "/static/page.js",
             "/support/0", "/nowhere", "/predict", "/docs/"],
)  # fmt: skip
def test_head_is_get_without_a_body(client, path):
    asked, head = client.get(path), client.ask("HEAD", path)
    assert (head.status, head.body) == (asked.status, b"")
    for name in ("content-type", "content-security-policy", "location", "allow"):
        assert head.headers.get(name) == asked.headers.get(name)


def test_a_connection_goes_on_after_head(client):
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=LONG)
    for method in ("HEAD", "GET", "HEAD"):
        connection.request(method, "/healthz")
        found = connection.getresponse()
        assert (found.status, found.read()) == (200, b'{"status":"ok"}' if method == "GET" else b"")
    connection.close()


# -- bodies ----------------------------------------------------------------------------------------


def as_json(value):
    return json.dumps(value).encode(), {"Content-Type": "application/json"}


def test_images_as_they_are_and_in_json_are_answered_as_in_a_form(client, photo):
    expected = ranking(client.predict(photo, query="?top=3").json["predictions"][0])
    text = base64.b64encode(photo).decode()
    lines = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    other, named = base64.urlsafe_b64encode(photo).decode(), {"data": text, "file": "cat.png"}
    several = [text, f"data:image/png;base64,{text}", lines, text.rstrip("="), other, named]
    bodies = [
        (photo, {"Content-Type": "image/png"}),
        (photo, {"Content-Type": "image/anything; a=b"}),
        (photo, {"Content-Type": "application/octet-stream"}),
        (photo, {"Content-Type": "application/x-www-form-urlencoded"}),  # curl --data-binary
        (photo, {}),
        as_json({"image": text}),
        as_json({"images": several}),
        (b"\xef\xbb\xbf" + as_json({"image": text})[0], {"Content-Type": "APPLICATION/JSON; a=b"}),
    ]
    for body, headers in bodies:
        found = client.ask("POST", "/predict?top=3", body, **headers)
        assert found.status == 200, found.body
        for entry in found.json["predictions"]:
            assert ranking(entry) == pytest.approx(expected, abs=1e-5)
    body, headers = as_json({"images": several})
    found = client.ask("POST", "/predict", body, **headers)
    names = [entry["file"] for entry in found.json["predictions"]]
    assert names == ["1", "2", "3", "4", "5", "cat.png"]


@pytest.mark.parametrize(
    ("value", "status", "said"),
    [
        ({"image": "!!!"}, 400, "image 1 is no base64"),
        ({"images": ["aGk=", "a"]}, 400, "image 2 is no base64"),
        ({"image": ""}, 400, "the file is empty"),
        ({"image": "aGFsbG8="}, 400, "not an image in a known format"),
        ({"image": 3}, 400, "image 1 is no text"),
        ({"image": {"data": "aGk=", "top": 3}}, 400, "image 1 is no text"),
        ({"image": {"data": "aGk=", "file": 3}}, 400, "image 1 is no text"),
        ({"images": []}, 400, "no images given"),
        ({"images": "aGk="}, 400, "no images given"),
        ({"images": ["aGk="] * 33}, 413, "a request may hold 32 images"),
        ({"images": ["aGk="], "top": 3}, 400, "go in the address"),
        ({"image": "aGk=", "images": []}, 400, "holds no images"),
        ({"photo": "aGk="}, 400, "holds no images"),
        (["aGk="], 400, "holds no images"),
        (b"{", 400, "the body is no JSON"),
        (b"", 400, "the body is no JSON"),
        (b'{"image": "aGk=", "image": "aGk="}', 400, "is there twice"),
        (b"[" * 100_000, 400, "the body is no JSON"),
        (b"\xff", 400, "the body is no JSON"),
        (b"9" * 5000, 400, "the body is no JSON"),
    ],
)
def test_json_that_is_none_or_holds_no_images(client, value, status, said):
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    found = client.ask("POST", "/predict", body, **{"Content-Type": "application/json"})
    assert (found.status, said in found.detail) == (status, True), found.detail
    assert "\n" not in found.detail


def test_other_bodies_are_bounded_and_refused_too(served, photo):
    with running(served, Limits(upload=100_000)) as client:
        for kind in ("image/png", "application/json"):
            assert client.ask("POST", "/predict", bytes(200_000),
                              **{"Content-Type": kind}).status == 413  # fmt: skip
        assert client.ask("POST", "/predict", b"", **{"Content-Type": "image/png"}).status == 400
        packed = {"Content-Type": "image/png", "Content-Encoding": "gzip"}
        assert client.ask("POST", "/predict", photo, **packed).status == 415
        for kind in ("text/plain", "application/xml", "video/mp4"):
            found = client.ask("POST", "/predict", photo, **{"Content-Type": kind})
            assert found.status == 415
            assert "multipart/form-data" in found.detail


# -- origins ---------------------------------------------------------------------------------------


def test_pages_of_ones_own_elsewhere_can_read_answers(served, photo):
    mine, other = "https://mine.example", "https://other.example"
    for token in (None, "right"):
        with running(served, origins=[mine, "http://localhost:3000"], token=token) as client:
            right = {"Authorization": "Bearer right"} if token else {}
            ask = {"Origin": mine, "Access-Control-Request-Method": "POST",
                   "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
            found = client.ask("OPTIONS", "/predict", **ask)
            assert found.status == 200
            assert found.headers["access-control-allow-origin"] == mine
            found = client.predict(photo, Origin=mine, **right)
            assert found.status == 200
            assert found.headers["access-control-allow-origin"] == mine
            assert "origin" in found.headers["vary"].lower()
            refused = client.ask("POST", "/predict", b"", Origin=mine, **right)
            assert refused.headers["access-control-allow-origin"] == mine, "it can read why"
            assert client.ask("OPTIONS", "/predict", **{**ask, "Origin": other}).status == 400
            for origin in (other, "http://mine.example", f"{mine}:8443", "http://localhost:3001"):
                found = client.predict(photo, Origin=origin, **right)
                assert "access-control-allow-origin" not in found.headers
                assert found.status == (200 if token else 403), origin
            assert client.get("/classes", Host="evil.example", Origin=mine).status in (401, 403)


def test_a_proxy_may_tell_its_own_name(client, photo):
    """It does so in headers that no page from elsewhere can send unasked."""
    own = {"Host": "127.0.0.1:8000", "X-Forwarded-Host": "photos.example",
           "X-Forwarded-Proto": "https"}  # fmt: skip
    assert client.predict(photo, **own, Origin="https://photos.example").status == 200
    for origin in ("http://photos.example", "https://photos.example:8443", "https://a.example"):
        assert client.predict(photo, **own, Origin=origin).status == 403, origin
    # What it does not tell is not guessed; and what it tells lets nobody in by another name.
    assert client.predict(photo, Host="localhost", Origin="https://localhost").status == 403
    named = {"Host": "evil.example", "X-Forwarded-Host": "localhost"}
    assert client.predict(photo, **named, Origin="http://evil.example").status == 403


def test_every_origin_that_is_told_counts(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=LONG) as open_:
        open_.sendall(b"GET /classes HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n"
                      b"Origin: http://evil.example\r\n\r\n")  # fmt: skip
        assert open_.recv(100).startswith(b"HTTP/1.1 403")


def test_names_that_are_allowed_are_whole_origins(served, photo):
    with running(served, names=["photos.example", "lab.example:8443"]) as client:
        good = ["http://photos.example", "https://photos.example", "https://lab.example:8443",
                "https://photos.example:443"]  # fmt: skip
        bad = ["https://photos.example:8443", "https://lab.example", "ftp://photos.example",
               "https://a.photos.example", "https://photos.example.evil"]  # fmt: skip
        for origin in (*good, *bad):
            found = client.predict(photo, Host="127.0.0.1", Origin=origin)
            assert found.status == (200 if origin in good else 403), origin


def test_pictures_are_for_pages_of_this_origin(client):
    for path in ("/support/0", "/classes", "/static/icon.svg", "/nowhere"):
        assert client.get(path).headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--allow-origin", "mine.example"], "--allow-origin mine.example is none"),
     (["--allow-origin", "*"], "--allow-origin * is none"),
     (["--allow-origin", "https://a.example/b"], "is none"),
     (["--allow-host", "https://a.example"], "--allow-host https://a.example is no name"),
     (["--root-path", "/a b"], "--root-path /a b is no plain path"),
     (["--root-path", "/a/../b"], "is no plain path")],
)  # fmt: skip
def test_options_that_are_none(run, options, said):
    made = CliRunner().invoke(app, ["serve", str(run.path), "--port", "0", *options])
    assert made.exit_code == 2, made.output
    assert said in " ".join(made.stderr.split())


# -- connections -----------------------------------------------------------------------------------


def connected(client):
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # few answers fit
    made.settimeout(LONG)
    made.connect(("127.0.0.1", client.port))
    return made


def held_open(client):
    """Connections that the server has not ended, however much of its answers is on the way."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return sum(int(row[1].split(":")[1], 16) == client.port and row[3] == "01" for row in rows)


LINUX = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
ASK = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"


@LINUX
@pytest.mark.parametrize("path", [b"/openapi.json", b"/classes", b"/static/page.js", b"/nowhere"])
def test_answers_that_nobody_takes_end_a_connection(served, monkeypatch, path):
    greedy = []
    with running(served) as client, monkeypatch.context() as soon:
        soon.setattr(server, "_HEADER_SECONDS", 0.5)
        soon.setattr(server, "_SLOWEST", 1e6)
        for _ in range(10):
            greedy.append(one := connected(client))
            one.settimeout(0.2)
            with contextlib.suppress(OSError):
                one.sendall(ASK % path * 600)
        until(lambda: held_open(client) == 0)
        for one in greedy:
            one.close()
        soon.undo()
        assert client.get("/healthz").status == 200


@LINUX
def test_a_large_answer_that_nobody_takes_ends_a_connection(served, monkeypatch):
    """Whoever takes it, if slowly, gets it whole; whoever does not, is not waited for."""
    large = b"x" * 12_000_000
    monkeypatch.setattr("prometheus_client.exposition.generate_latest", lambda _: large)
    with running(served) as client:
        slow = connected(client)
        slow.sendall(ASK % b"/metrics")
        with monkeypatch.context() as soon:
            soon.setattr(server, "_HEADER_SECONDS", 0.1)
            got = len(slow.recv(200_000))
            time.sleep(1)  # longer than for a header, and not at all for so much
        while got < len(large):
            piece = slow.recv(200_000)
            assert piece, f"ended after {got:,} bytes"
            got += len(piece)
        slow.close()
        still, left = connected(client), len(large)
        monkeypatch.setattr(server, "_HEADER_SECONDS", 0.5)
        monkeypatch.setattr(server, "_SLOWEST", 1e8)
        still.sendall(ASK % b"/metrics")
        until(lambda: held_open(client) == 0)
        with contextlib.suppress(ConnectionResetError):
            while piece := still.recv(2**20):
                left -= len(piece)
        assert left > 0, "what it did not take is thrown away"
        still.close()


def test_no_more_is_answered_than_may_be_asked_ahead(client):
    with socket.create_connection(("127.0.0.1", client.port), timeout=LONG) as opened:
        opened.sendall(ASK % b"/healthz" * 100)
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # what was not read is thrown away
            while piece := opened.recv(65536):
                answer += piece
    assert answer.count(b"HTTP/1.1 200") == server._MOST_AHEAD + 1
    assert answer.lower().count(b"connection: close") == 1
    # Who waits for each answer may go on and on, and a few at a time are no harm either.
    with socket.create_connection(("127.0.0.1", client.port), timeout=LONG) as opened:
        for count in (*[1] * 60, *[5] * 20):
            opened.sendall(ASK % b"/healthz" * count)
            answer = b""
            while answer.count(b'"ok"}') < count:
                piece = opened.recv(65536)
                assert piece
                answer += piece


def test_a_client_cannot_fill_the_log(client, capfd):
    def bad(text):
        with socket.create_connection(("127.0.0.1", client.port), timeout=LONG) as opened:
            opened.sendall(text)
            opened.recv(100)

    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    for _ in range(200):
        bad(b"nonsense\r\n\r\n")
    for _ in range(100):
        bad((ASK % b"/healthz")[:-2] + upgrade)
    said = capfd.readouterr().err
    assert len(said.splitlines()) <= 40
    assert len(said) < 8000


def test_each_kind_of_error_is_in_the_log():
    spare, passed = server._Sparing(), []

    def record(error):
        try:
            raise error
        except Exception:
            found = logging.LogRecord("a", logging.ERROR, "", 0, "failed", (), sys.exc_info())
        return found

    for error in [ValueError()] * 100 + [TypeError()]:
        if spare.filter(made := record(error)):
            passed.append(made.exc_info[0])
    assert passed.count(ValueError) == 7  # 1, 2, 4, ... 64
    assert passed.count(TypeError) == 1


# -- several workers -------------------------------------------------------------------------------


@LINUX
def test_several_workers_answer_at_one_address(run, photo):
    process = subprocess.Popen(
        [sys.executable, "-m", "dapt.cli", "serve", str(run.path), "--port", "0", "--workers", "2",
         "--timeout", str(LONG)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert "3 classes, at http://" in line, line + process.stderr.read()
        client = Client(int(line.split(" (")[0].rpartition(":")[2]))
        answers = {tuple(ranking(client.predict(photo).json["predictions"][0])) for _ in range(20)}
        assert len(answers) == 1
        counted = 'dapt_requests_total{path="/predict",status="200"}'
        # Of both, whoever is asked: one counts once it has answered, and the other may tell before.
        until(lambda: client.metric(counted) == 20)
        for idle in ("dapt_queue_images", "dapt_decoders_busy", "dapt_decoder_longest_seconds"):
            until(lambda idle=idle: client.metric(idle) == 0)  # of all together, set now and then
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        lines = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
        workers = [child for child, line in lines.items() if b"spawn_main" in line]
        assert len(workers) == 2
        os.kill(int(workers[0]), signal.SIGKILL)
        for _ in range(5):
            assert client.get("/healthz").status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(LONG) == 0
        said = process.stderr.read()
        assert "Traceback" not in said
        with pytest.raises(ConnectionRefusedError):
            client.get("/healthz")
    finally:
        process.kill()
        process.communicate()


def test_workers_that_cannot_begin_are_said_in_a_sentence(run, tmp_path, capfd):
    shutil.copytree(run.path, tmp_path / "run")
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    environment["backbone_sha256"] = "0" * 64
    (tmp_path / "run/environment.json").write_text(json.dumps(environment))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        asked = ["serve", str(tmp_path / "run"), "--port", "0", "--workers", "2"]
        made = CliRunner().invoke(app, asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert made.exit_code == 2, made.output
    assert "are not those that" in " ".join(made.stderr.split())
    assert "Traceback" not in made.stderr + capfd.readouterr().err
