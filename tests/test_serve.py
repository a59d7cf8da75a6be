"""'dapt serve': answers, limits, what waits, how it stops, and the page in a browser."""

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from dataclasses import dataclass, field, replace
from urllib.parse import quote, urljoin

import pytest
from fastapi.openapi.utils import get_openapi
from hypothesis import given
from hypothesis import strategies as st
from patience import LONG, until
from PIL import Image
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner

from conftest import fuzzed, jpeg_of_scans, tiff_of_a_tile
from dapt.cli import app
from dapt.data import open_task
from dapt.errors import UserError
from dapt.predict import predict_each
from dapt.run.directory import RunDirectory
from dapt.run.records import ForecastRecord
from dapt.run.train import train
from dapt.serve import decoders, server
from dapt.serve.answers import Batcher
from dapt.serve.app import Limits, create_app
from dapt.serve.feedback import open_feedback
from dapt.serve.served import Served, load_served
from dapt.settings import make_settings

runner = CliRunner()


@pytest.fixture(scope="module")
def run(tiny_weights, photo_folder, tmp_path_factory):
    given = {"dataset": str(photo_folder), "backbone": str(tiny_weights), "shots": 2,
             "epochs": 1, "batch_size": 4}  # fmt: skip
    return train(make_settings(given), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def served(run):
    return load_served(run)


@pytest.fixture(scope="module")
def pictures(photo_folder):
    return sorted((photo_folder / "test").rglob("*.png"))


@dataclass
class Answered:
    """A response, and how to ask for more."""

    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def detail(self):
        return self.json["detail"]


class Client:
    def __init__(self, port, **headers):
        self.port, self.headers = port, headers

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG)
        try:
            connection.request(method, path, body, {**self.headers, **headers})
            found = connection.getresponse()
            return Answered(found.status, dict(found.getheaders()), found.read())
        finally:
            connection.close()

    def get(self, path, **headers):
        return self.ask("GET", path, **headers)

    def predict(self, *files, query="", **headers):
        """Files are paths, or bytes."""
        files = [f if isinstance(f, bytes) else f.read_bytes() for f in files]
        kind, body = form([("images", f"{i}.png", data) for i, data in enumerate(files)])
        return self.ask("POST", f"/predict{query}", body, **{"Content-Type": kind, **headers})

    def metric(self, name):
        text = self.get("/metrics").body.decode()
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
        return float(found[1]) if found else 0.0


def form(parts):
    """Content type and body of a multipart form of (field, file name, bytes)."""
    lines = []
    for name, file, data in parts:
        place = f'form-data; name="{name}"' + (f'; filename="{file}"' if file else "")
        lines += [b"--limit", f"Content-Disposition: {place}".encode(), b"", data]
    return "multipart/form-data; boundary=limit", b"\r\n".join([*lines, b"--limit--", b""])


def png_header(width, height):
    """A PNG that claims a size, and has few bytes of pixels."""

    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))  # fmt: skip

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))  # fmt: skip


# A first request waits until a decoder is there, and a busy machine takes long to start one.
PATIENT = Limits(timeout=LONG)


@contextlib.contextmanager
def running(served, limits=None, *, address="127.0.0.1", **more):
    found = server.open_socket(address, 0)
    ready = threading.Event()
    made = server.make_server(served, found, limits or PATIENT, ready=ready.set, **more)
    thread = threading.Thread(target=made.run, args=([found],))
    port = found.getsockname()[1]
    thread.start()
    try:
        assert ready.wait(LONG)
        yield Client(port)
    finally:
        made.should_exit = True
        thread.join(LONG)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(served):
    with running(served) as client:
        yield client


@dataclass(frozen=True)
class Held(Served):
    """A model that begins no batch until it may, and tells how large each is."""

    go: threading.Event = field(default_factory=threading.Event)
    sizes: list = field(default_factory=list)

    def answers(self, views):
        assert self.go.wait(LONG)
        self.sizes.append(len(views))
        return super().answers(views)


def held(served):
    return Held(**{name: getattr(served, name) for name in Served.__dataclass_fields__})


def together(*calls):
    """Results of calls made at the same time, once all are there."""
    results = [None] * len(calls)

    def call(place):
        results[place] = calls[place]()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    return threads, results


@pytest.fixture
def started(monkeypatch):
    """The decoders of the servers that are started from here on."""
    made, start = [], decoders.Decoders.start
    monkeypatch.setattr(decoders.Decoders, "start", lambda one: made.append(one) or start(one))
    return made


def ranking(entry):
    return {one["class"]: one["probability"] for one in entry["classes"]}


def test_the_same_answers_as_predict(client, served, pictures):
    expected = list(predict_each(served.classifier, pictures, top=3))
    found = client.predict(*pictures, query="?top=3")
    assert found.status == 200
    entries = found.json["predictions"]
    assert [entry["file"] for entry in entries] == [f"{i}.png" for i in range(len(pictures))]
    for entry, one in zip(entries, expected, strict=True):
        assert [c["class"] for c in entry["classes"]] == [name for name, _ in one.classes]
        assert ranking(entry) == pytest.approx(dict(one.classes), abs=1e-5)
    assert len(client.predict(pictures[0], query="?top=1").json["predictions"][0]["classes"]) == 1


def test_concurrent_requests_share_batches(served, pictures, monkeypatch):
    slow, queued, answer = held(served), [], Batcher.answer
    monkeypatch.setattr(Batcher, "answer", lambda *a: queued.append(a) or answer(*a))
    with running(slow, replace(PATIENT, batch=4)) as client:
        calls = [lambda p=p: client.predict(p, query="?top=3") for p in pictures[:9]]
        threads, found = together(*calls)
        until(lambda: len(queued) == 9)
        slow.go.set()
        for thread in threads:
            thread.join()
        assert client.metric("dapt_batch_images_sum") == 9
    assert sum(slow.sizes) == 9
    assert max(slow.sizes) == 4, "as many as may be"
    expected = list(predict_each(served.classifier, pictures[:9], top=3))
    for answer, one in zip(found, expected, strict=True):
        entry = answer.json["predictions"][0]
        assert ranking(entry) == pytest.approx(dict(one.classes), abs=1e-5)


def test_nearest_support_images(client, served, run):
    items = json.loads(run.support_file.read_text())["train"]
    root = run.read_settings().dataset
    file = os.path.join(root, items[3]["path"])
    if not os.path.exists(file):
        file = os.path.join(root, "train", items[3]["path"])
    with open(file, "rb") as opened:
        found = client.predict(opened.read(), query="?nearest=3").json["predictions"][0]["nearest"]
    assert found[0]["image"] == "/support/3"
    assert found[0]["class"] == items[3]["class_name"]
    assert found[0]["cosine"] == pytest.approx(1, abs=1e-4)
    cosines = [one["cosine"] for one in found]
    assert cosines == sorted(cosines, reverse=True)
    assert len(found) == 3
    picture = client.get("/support/3")
    assert picture.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(picture.body)).size == (32, 32)
    for missing in ("/support/6", "/support/-1"):
        assert client.get(missing).status == 404
    assert client.get("/support/x").status == 422


def test_runs_without_support_images(served, run, pictures, tmp_path):
    copy = tmp_path / "moved"
    shutil.copytree(run.path, copy)
    settings = json.loads((copy / "settings.json").read_text())
    (copy / "settings.json").write_text(json.dumps({**settings, "dataset": "imported"}))
    bare = load_served(RunDirectory(copy))
    assert bare.support is None
    with running(bare) as client:
        found = client.predict(pictures[0], query="?nearest=3")
        assert found.status == 200
        assert "nearest" not in found.json["predictions"][0]
        assert client.get("/classes").json["support_images"] == 0
        assert client.get("/support/0").status == 404


def test_a_run_cannot_choose_whose_images_are_shown(run, tmp_path):
    """A stranger's may name any folder, with files of the names it lists."""
    shutil.copytree(run.path, tmp_path / "strange")
    strange = RunDirectory(tmp_path / "strange")
    settings = json.loads(strange.settings_file.read_text())
    shutil.copytree(settings["dataset"], tmp_path / "pictures")
    strange.settings_file.write_text(
        json.dumps({**settings, "dataset": str(tmp_path / "pictures")})
    )
    assert load_served(strange).support is not None
    item = json.loads(run.support_file.read_text())["train"][0]["path"]
    folders = (tmp_path / "pictures", tmp_path / "pictures" / "train")
    image = next(folder / item for folder in folders if (folder / item).exists())
    Image.new("RGB", (40, 40), "red").save(image)
    assert load_served(strange).support is None
    # What cannot be read has no digest, and none is no proof.
    image.unlink()
    metrics = json.loads(strange.metrics_file.read_text())
    strange.metrics_file.write_text(json.dumps({**metrics, "support_sha256": None}))
    assert load_served(strange).support is None


def test_bad_images(client, pictures):
    good = pictures[0].read_bytes()
    truncated, huge = good[: len(good) // 2], png_header(30_000, 30_000)
    for data, status, sentence in (
        (b"no image", 400, "image 0.png cannot be read: not an image in a known format"),
        (b"", 400, "the file is empty"),
        (truncated, 400, "image 0.png cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 400, "known format"),
        (png_header(9_000, 9_000), 413, "9,000 x 9,000 pixels, more than the 50,000,000 allowed"),
        (huge, 413, "make it smaller"),
        (tiff_of_a_tile(9_000), 400, "known format"),
        (jpeg_of_scans(300), 400, "it has more than 256 scans"),
    ):
        found = client.predict(data)
        assert (found.status, sentence in found.detail) == (status, True), found.detail
        assert "\n" not in found.detail
    found = client.predict(good, truncated, huge, good)
    assert found.status == 200
    entries = found.json["predictions"]
    assert ["error" in entry for entry in entries] == [False, True, True, False]
    assert "make it smaller" in entries[2]["error"]
    assert "classes" not in entries[1]
    assert ranking(entries[0]) == pytest.approx(ranking(entries[3]), abs=1e-5)


def test_bad_requests(client, pictures):
    good = pictures[0].read_bytes()

    def post(parts, query=""):
        kind, body = form(parts)
        return client.ask("POST", f"/predict{query}", body, **{"Content-Type": kind})

    assert post([]).status == 400
    assert "no images given" in post([]).detail
    for parts in ([("photo", "a.png", good)], [("images", "", b"text")]):
        assert post(parts).status == 400
        assert "send files in fields named 'images'" in post(parts).detail
    assert post([("images", "a.png", good)] * 33).status == 413
    assert post([("images", "a.png", good)] * 50).detail.startswith("a request may hold 32 images")
    for query in ("?top=0", "?top=x", "?nearest=51"):
        assert post([("images", "a.png", good)], query).status == 422
    assert client.ask("POST", "/predict", good, **{"Content-Type": "text/plain"}).status == 415
    kind = {"Content-Type": "multipart/form-data; boundary=limit"}
    assert client.ask("POST", "/predict", b"--other\r\nx", **kind).status == 400
    assert client.get("/predict").status == 405
    assert client.get("/nowhere").status == 404
    assert post([("a\x85b", "a.png", good)]).detail.startswith("field 'a\\x85b' is no image")
    odd = post([("images", "\x01<b>\x7f", good)]).json["predictions"][0]["file"]
    assert odd == "<b>"


@pytest.mark.fuzz
@fuzzed(60)
@given(st.data())
def test_no_bytes_bring_it_down(client, pictures, data):
    """Damaged images, and damaged forms around them, are answered with a sentence."""
    image = Image.open(pictures[0])
    file = io.BytesIO()
    image.save(file, data.draw(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])))
    kind, body = form([("images", "a", file.getvalue())])
    if data.draw(st.booleans()):
        body = bytearray(body)
        for _ in range(data.draw(st.integers(1, 8))):
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    else:
        body = data.draw(st.binary(max_size=200)) + body[data.draw(st.integers(0, len(body))) :]
    found = client.ask("POST", "/predict", bytes(body), **{"Content-Type": kind})
    assert found.status in (200, 400, 413)
    if found.status != 200:
        assert len(found.detail.splitlines()) == 1


@pytest.mark.fuzz
@fuzzed(100)
@given(st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=20))
def test_no_other_token_is_right(closed, token):
    for value in (token, f"Bearer {token}", f"Bearer a secret.{token}"):
        assert closed.get("/classes", Authorization=value.encode("latin-1")).status == 401


def test_uploads_are_bounded_as_they_arrive(served, pictures):
    with running(served, replace(PATIENT, upload=100_000)) as client:
        kind, body = form([("images", "a.png", bytes(200_000))])
        found = client.ask("POST", "/predict", body, **{"Content-Type": kind})
        assert found.status == 413
        assert "a request may hold 100,000 bytes" in found.detail
        # Without a length, and without an end.
        with socket.create_connection(("127.0.0.1", client.port), timeout=LONG) as open_:
            open_.sendall(f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
                          "Transfer-Encoding: chunked\r\n\r\n".encode())  # fmt: skip
            for start in range(0, 150_000, 10_000):
                piece = body[start : start + 10_000]
                open_.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            assert open_.recv(100).startswith(b"HTTP/1.1 413")
        # A length that is too much is refused before anything is sent.
        with socket.create_connection(("127.0.0.1", client.port), timeout=LONG) as open_:
            open_.sendall(f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
                          "Content-Length: 1000000\r\n\r\n".encode())  # fmt: skip
            assert open_.recv(100).startswith(b"HTTP/1.1 413")
        assert client.predict(pictures[0]).status == 200


def test_a_full_queue_and_a_late_answer(served, pictures):
    slow, limits = held(served), replace(PATIENT, queue=3)
    with running(slow, limits) as client:
        threads, found = together(lambda: client.predict(*pictures[:3]))
        until(lambda: client.metric("dapt_queue_images") == 3)
        refused = client.predict(pictures[0])
        assert refused.status == 429
        assert refused.headers["retry-after"] == "1"
        assert "try again" in refused.detail
        slow.go.set()
        threads[0].join()
        assert found[0].status == 200
        slow.go.clear()
        object.__setattr__(limits, "timeout", 0.5)  # of requests that come from now on
        late = client.predict(*pictures[:3])
        assert late.status == 503
        assert late.headers["retry-after"] == "1"
        assert "no answer within 0.5 s" in late.detail
        assert client.metric("dapt_queue_images") == 0
        object.__setattr__(limits, "timeout", LONG)
        slow.go.set()
        assert client.predict(*pictures[:3]).status == 200
        for status in (429, 503):
            count = f'dapt_requests_total{{path="/predict",status="{status}"}}'
            until(lambda count=count: client.metric(count) == 1)
        assert client.predict(*pictures[:4]).status == 429, "more than ever fit"


def test_a_model_that_fails_once(served, pictures, capfd):
    @dataclass(frozen=True)
    class Failing(Served):
        left: list = field(default_factory=lambda: [1])

        def answers(self, views):
            if self.left:
                raise RuntimeError(self.left.pop())
            return super().answers(views)

    failing = Failing(**{name: getattr(served, name) for name in Served.__dataclass_fields__})
    with running(failing) as client:
        found = client.predict(pictures[0])
        assert found.status == 500
        assert "Traceback" not in found.body.decode()
        assert client.predict(pictures[0]).status == 200
    assert "RuntimeError" in capfd.readouterr().err, "it is in the log"


def test_a_stuck_decoder_shows_and_is_ended(served, pictures, started, monkeypatch):
    """Where all are stuck, the server does not call itself well."""
    with monkeypatch.context() as stuck:
        stuck.setattr(decoders, "_STUCK", 0.3)
        stuck.setattr(decoders, "_START", "import time; time.sleep(1000)")
        with running(served) as client:
            count = min(4, os.cpu_count())
            threads, found = together(*[lambda: client.predict(pictures[0])] * count)
            until(lambda: client.get("/healthz").status == 503)
            told = {"status": "stuck", "stuck_decoders": count, "decoders": count}
            assert client.get("/healthz").json == told
            until(lambda: client.metric("dapt_decoders_busy") == count)
            until(lambda: client.metric("dapt_decoder_longest_seconds") > 0.3)
            stuck.undo()
            assert started[0]._patience == LONG, "as long as a request may take"
            started[0]._patience = 0.0
            for thread in threads:
                thread.join()
            started[0]._patience = LONG
            assert [one.status for one in found] == [400] * count
            assert client.metric("dapt_decoders_ended_total") == count
            assert client.get("/healthz").json == {"status": "ok"}
            until(lambda: client.metric("dapt_decoders_busy") == 0)
            assert client.predict(pictures[0]).status == 200


def test_a_decoder_computes_for_so_long_and_no_longer(served, pictures, monkeypatch):
    code = "import sys; sys.argv[1:] = [sys.argv[1]]; from dapt.serve import decoder; "
    spin = "decoder.pictures.decode_image = lambda *_, **__: [0 for _ in iter(int, 1)]; "
    monkeypatch.setattr(decoders, "_START", f"{code}{spin}decoder.main()")
    with running(served, replace(PATIENT, decode=0.5)) as client:
        found = client.predict(pictures[0])
        assert found.status == 400
        assert "0.png takes too long to decode" in found.detail


def test_slow_clients(served, pictures, monkeypatch):
    with running(served) as client, monkeypatch.context() as soon:
        soon.setattr(server, "_HEADER_SECONDS", 0.5)
        silent = socket.create_connection(("127.0.0.1", client.port), timeout=LONG)
        dribbling = socket.create_connection(("127.0.0.1", client.port), timeout=LONG)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            dribbling.sendall(b"GET /healthz HTT")
        for ended in (silent, dribbling):
            with ended, contextlib.suppress(ConnectionResetError):
                assert ended.recv(100) == b""
        soon.undo()
        assert client.predict(pictures[0]).status == 200


def test_a_body_that_does_not_come(served, pictures):
    kind, body = form([("images", "a.png", pictures[0].read_bytes())])
    with (
        running(served, Limits(timeout=1.0)) as client,
        socket.create_connection(("127.0.0.1", client.port), timeout=LONG) as slow,
    ):
        slow.sendall(f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
                     f"Content-Length: {len(body)}\r\n\r\n".encode() + body[:100])  # fmt: skip
        answer = b""
        while b"}" not in answer:
            piece = slow.recv(1000)
            assert piece, answer
            answer += piece
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"did not arrive within 1 s" in answer
        assert client.get("/healthz").status == 200


@pytest.fixture(scope="module")
def closed(served):
    with running(served, token="a secret") as client:
        yield client


def test_token(closed, pictures):
    for path in ("/", "/docs", "/openapi.json", "/healthz", "/static/page.js"):
        assert closed.get(path).status == 200
    wrong = ("", "Bearer", "Bearer other", "Basic a secret", "Bearer a secret2", "Bearer \xe9")
    for path in ("/classes", "/metrics", "/support/0", "/nowhere"):
        for value in wrong:
            found = closed.get(path, Authorization=value)
            assert found.status == 401
            assert found.headers["www-authenticate"] == "Bearer"
    assert closed.get("/static/../classes").status == 404
    assert closed.predict(pictures[0]).status == 401
    right = {"Authorization": "Bearer a secret"}
    assert closed.predict(pictures[0], **right).status == 200
    assert closed.get("/classes", **right, Host="any.example").status == 200


def test_names_of_other_hosts_are_refused(served):
    with running(served, names=["Photos.example"]) as client:
        for host in ("evil.example", "", "localhost.evil.example:80", "[::2]", "[::1]evil.example",
                     "[::1].evil.example:80", "[::1", "::1]", "[127.0.0.1]", "localhost:80:80",
                     "localhost:99999", "localhost:-1", "a@localhost", "localhost/"):  # fmt: skip
            assert client.get("/classes", Host=host).status == 403
        for host in ("localhost:1", "127.0.0.1", "[::1]:8000", "LOCALHOST", "photos.example"):
            assert client.get("/classes", Host=host).status == 200


def test_pages_of_other_servers_are_refused(client, pictures):
    """As a form or script of any page could ask, without being able to read the answer."""
    port = client.port
    for origin in ("https://evil.example", "null", "", "http://localhost.evil.example:8000",
                   "http://[", "http://evil.example@localhost.evil", "http://localhost",
                   f"http://127.0.0.1:{port + 1}", f"https://127.0.0.1:{port}", "http://127.0.0.1",
                   f"http://localhost:{port}", f"http://[::1]:{port}", f"127.0.0.1:{port}",
                   f"http://127.0.0.1:{port}.evil.example",
                   f"http://127.0.0.1:{port}/"):  # fmt: skip
        found = client.predict(pictures[0], Origin=origin)
        assert (found.status, "another server" in found.detail) == (403, True), origin
        assert client.get("/classes", Origin=origin).status == 403
    for host in (f"127.0.0.1:{port}", "localhost:9000", "[::1]:8000", "localhost", "[0:0::1]:80"):
        own = {"Host": host, "Origin": f"http://{host}".removesuffix(":80")}
        assert client.predict(pictures[0], **own).status == 200, host


def test_on_all_addresses_names_and_pages_are_checked_too(served, pictures):
    """Without a token: a page whose name leads here, or that posts here, is no client."""
    with running(served, address="0.0.0.0", names=["Photos.example"]) as client:
        for host in ("evil.example", "", "10.0.0.5.evil.example"):
            assert client.get("/classes", Host=host).status == 403, host
        for host in ("10.0.0.5:80", "[fd00::5]:8000", "LOCALHOST:1", "photos.example",
                     socket.gethostname()):  # fmt: skip
            own = {"Host": host, "Origin": f"http://{host}"}
            assert client.predict(pictures[0], **own).status == 200, host
        for origin in ("http://evil.example", "http://10.0.0.6", "http://localhost", "null"):
            found = client.predict(pictures[0], Host="10.0.0.5", Origin=origin)
            assert (found.status, "another server" in found.detail) == (403, True), origin
        proxied = client.predict(pictures[0], Host="10.0.0.5", Origin="https://photos.example")
        assert proxied.status == 200


def test_classes_health_and_metrics(client, served, pictures):
    found = client.get("/classes").json
    assert found["classes"] == list(served.class_names)
    assert found["support_images"] == 6
    assert found["limits"] == {"upload_bytes": 20 * 2**20, "images": 32, "pixels": 50_000_000}
    assert client.get("/healthz").json == {"status": "ok"}
    name = 'dapt_requests_total{path="/predict",status="200"}'
    before = client.metric(name), client.metric('dapt_images_total{result="ok"}')
    client.predict(*pictures[:2])
    until(lambda: client.metric(name) == before[0] + 1)  # once the answer is sent
    assert client.metric('dapt_images_total{result="ok"}') == before[1] + 2
    bad = client.metric('dapt_images_total{result="error"}')
    client.predict(b"x")
    assert client.metric('dapt_images_total{result="error"}') == bad + 1
    assert client.metric("dapt_queue_images") == 0
    text = client.get("/metrics").body.decode()
    assert 'dapt_request_seconds_bucket{le="0.1",path="/predict"}' in text
    client.get("/some/random/path")
    assert "random" not in client.get("/metrics").body.decode(), "no label without end"


def test_the_api_is_as_described(client, served, pictures):
    """Paths, parameters and their bounds, and the names in every answer."""
    described = client.get("/openapi.json").json
    app = create_app(served, Limits(), CollectorRegistry(), lambda: None)
    routes = get_openapi(title="", version="", routes=app.routes)["paths"]
    assert list(routes) == list(described["paths"])
    for path, methods in routes.items():
        assert list(methods) == list(described["paths"][path])
        for method, made in methods.items():
            told = described["paths"][path][method].get("parameters", [])
            bounds = [{k: v for k, v in one.items() if k != "description"} for one in told]
            assert made.get("parameters", []) == bounds
    schemas = described["components"]["schemas"]

    def check(value, schema):
        schema = schemas[schema["$ref"].split("/")[-1]] if "$ref" in schema else schema
        kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": float,
                 "boolean": bool}  # fmt: skip
        assert isinstance(value, kinds[schema["type"]])
        if schema["type"] == "object":
            assert set(schema["required"]) <= set(value) <= set(schema["properties"])
            for name, inner in value.items():
                check(inner, schema["properties"][name])
        for inner in value if schema["type"] == "array" else ():
            check(inner, schema["items"])

    check(client.predict(pictures[0], b"", query="?nearest=2").json, schemas["Predictions"])
    check(client.get("/classes").json, schemas["Classes"])
    check(client.get("/healthz").json, schemas["Health"])
    check(client.get("/nowhere").json, schemas["Problem"])


def test_what_to_expect_is_told_where_it_is_known(client, served):
    assert "forecast" not in client.get("/classes").json  # prompts hold nothing out
    shares = [0.0, 1.0]
    told = {"images": 40, "accuracy": 0.8, "low": 0.7, "high": 0.9,
            "ece": {"before": 0, "after": 0},
            "confused": [{"classes": ["blue", "red"], "images": 3}], "advice": "More photos.",
            "true": shares, "best": shares}  # fmt: skip
    foretold = replace(served, forecast=ForecastRecord.model_validate(told))
    with running(foretold) as other:
        found = other.get("/classes").json["forecast"]
    assert found == {k: v for k, v in told.items() if k not in ("ece", "true", "best")}
    schemas = client.get("/openapi.json").json["components"]["schemas"]
    assert set(schemas["Forecast"]["required"]) == set(found)


def test_pages_need_nothing_from_elsewhere(client):
    assert set(client.get("/openapi.json").json["paths"]) == {
        "/predict", "/feedback", "/classes", "/support/{number}", "/healthz", "/metrics"
    }  # fmt: skip
    for page in ("/", "/docs"):
        found = client.get(page)
        assert found.headers["content-type"].startswith("text/html")
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        text = found.body.decode()
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", text)
        links = re.findall(r'(?:src|href)="([^"]+)"', text)
        assert all(link.startswith("./") for link in links)
        for link in links:
            body = client.get(urljoin(page, link))
            assert body.status == 200
            outside = re.sub(rb'"http://www.w3.org/2000/svg"', b"", body.body)
            assert not re.search(rb"https?://", outside)


def test_answers_go_at_once():
    """Or a small one would wait for the client's acknowledgement of what went before: 40 ms."""
    with server.open_socket("127.0.0.1", 0) as listening:
        with socket.create_connection(listening.getsockname(), timeout=LONG):
            accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# -- the command ---------------------------------------------------------------------------------


COMMAND = """
import sys
from dapt.cli import main
from dapt.serve import decoders
decoders._CLOSING = float(sys.argv.pop(1))
main()
"""


@contextlib.contextmanager
def command(run, *arguments, closing=LONG, **environment):
    """The command in a process of its own, once it answers: the process and a client.

    A request may take longer than any test waits; a picture, for so long once the server ends.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(closing), "serve", str(run.path), "--port", "0",
         "--timeout", str(10 * LONG), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        found = re.search(r"3 classes, at http://[\d.]+:(\d+) ", line)
        assert found, line + process.stderr.read()
        yield process, Client(int(found[1]))
    finally:
        process.kill()
        process.communicate()


def refused(client):
    """Whether nobody takes a connection any more."""
    try:
        client.get("/healthz")
    except OSError:
        return True
    return False


def stopped_in_order(process, client, number, data, **headers):
    """A request that has begun is answered after the signal; what comes later is refused."""
    kind, body = form([("images", "a.png", data)])
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    with socket.create_connection(("127.0.0.1", client.port), timeout=LONG) as begun:
        begun.sendall(f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
                      f"{''.join(lines)}Content-Length: {len(body)}\r\n\r\n".encode()
                      + body[:50])  # fmt: skip
        assert client.get("/healthz").status == 200
        process.send_signal(number)
        until(lambda: refused(client))
        begun.sendall(body[50:])
        answer = b""
        while piece := begun.recv(10_000):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"probability"' in answer
    assert process.wait(LONG) == 0
    said = process.stderr.read()
    assert "Traceback" not in said
    return " ".join(said.split())


def test_token_from_the_environment_and_sigint(run, pictures):
    with command(run, "--host", "0.0.0.0", DAPT_TOKEN="s3cret") as (process, client):
        assert client.get("/classes").status == 401
        right = {"Authorization": "Bearer s3cret"}
        assert client.get("/classes", **right).json["support_images"] == 6
        data = pictures[0].read_bytes()
        assert "warning" not in stopped_in_order(process, client, signal.SIGINT, data, **right)


def test_options_and_sigterm(run, pictures):
    options = ("--host", "0.0.0.0", "--max-pixels", "0.01", "--no-nearest")
    with command(run, *options) as (process, client):
        found = client.predict(png_header(200, 200))
        assert found.status == 413
        assert "10,000 allowed" in found.detail
        assert client.get("/classes").json["support_images"] == 0
        said = stopped_in_order(process, client, signal.SIGTERM, pictures[0].read_bytes())
        assert "give --token or DAPT_TOKEN" in said


def test_what_cannot_be_served_is_said_in_a_sentence(run, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases = [
            ([run.path, "--port", port], f"port {port} of 127.0.0.1 is in use"),
            ([run.path, "--host", "no such host"], "is no address"),
            ([run.path, "--host", "192.0.2.1", "--port", 0], "no address of this machine"),
            ([tmp_path], "is no run directory"),
            ([run.path, "--token", "caf\xe9"], "--token must be printable ASCII"),
            ([run.path, "--token", ""], "--token must be printable ASCII"),
            ([run.path, "--queue", 3], "--max-images 32 do not fit --queue 3"),
        ]
        for arguments, sentence in cases:
            result = runner.invoke(app, ["serve", *map(str, arguments)])
            assert result.exit_code == 2, result.output
            assert sentence in " ".join(result.stderr.split())
            assert "Traceback" not in result.output
    for name in ("dapt.serve.server", "dapt.serve.app"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("dapt.serve.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = runner.invoke(app, ["serve", str(run.path)])
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "serving needs uvicorn: pip install 'dapt-clip[serve]'" in said


def decoders_of(process):
    """Numbers of a server's decoder processes, once they are there."""
    found = []

    def there():
        found[:] = []
        for folder in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if folder.isdecimal():
                    with open(f"/proc/{folder}/stat") as file:
                        parent = int(file.read().rpartition(") ")[2].split()[1])
                    found.extend([int(folder)] * (parent == process.pid))
        return len(found) == min(4, os.cpu_count())

    until(there)
    return found


def begun(client, data):
    """A request that waits for its answer, in a thread of its own."""

    def ask():
        with contextlib.suppress(OSError, http.client.HTTPException):
            client.predict(data)

    threading.Thread(target=ask, daemon=True).start()
    until(lambda: client.metric("dapt_decoders_busy") == 1)


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@on_linux
@pytest.mark.parametrize(
    ("signals", "closing"), [([signal.SIGTERM], decoders._CLOSING), ([signal.SIGINT] * 2, LONG)]
)
def test_a_stuck_decoder_holds_up_no_exit(run, pictures, signals, closing):
    """It is not waited for but for a moment; and after a second Ctrl-C not at all."""
    with command(run, closing=closing) as (process, client):
        children = decoders_of(process)
        for child in children:
            os.kill(child, signal.SIGSTOP)
        begun(client, pictures[0].read_bytes())
        assert client.get("/healthz").status == 200
        for number in signals:
            process.send_signal(number)
            until(lambda: refused(client))  # two that come at once would be one
        assert process.wait(LONG) == (0 if len(signals) == 1 else -signal.SIGINT)
        until(lambda: not any(os.path.exists(f"/proc/{child}") for child in children))


@on_linux
def test_a_decoder_that_was_ended_is_replaced(served, pictures, started):
    with running(served) as client:
        (own,) = started
        for one in own._idle:
            os.kill(one.pid, signal.SIGKILL)
            os.waitid(os.P_PID, one.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked
        for _ in range(4):
            assert client.predict(pictures[0]).status == 200
        for one in own._idle:
            os.kill(one.pid, signal.SIGSTOP)
        begun(client, pictures[0].read_bytes())
        until(lambda: own._busy)  # the request has come to a decoder
        for one in [*own._busy]:
            os.kill(one.pid, signal.SIGKILL)
        until(lambda: client.metric("dapt_decoders_ended_total") == 1)
        assert client.predict(pictures[0]).status == 200


# -- corrected photos ----------------------------------------------------------------------------


@pytest.fixture
def keeping(served, tmp_path):
    kept = open_feedback(tmp_path / "kept", 10**6, served.class_names)
    with running(served, replace(PATIENT, images=4), feedback=kept) as client:
        yield client, kept.folder


def correct(client, name, *files, **headers):
    kind, body = form([("images", f"../{i}.exe", data) for i, data in enumerate(files)])
    return client.ask("POST", f"/feedback?class={quote(name)}", body,
                      **{"Content-Type": kind, **headers})  # fmt: skip


def test_corrected_photos_are_kept_for_the_next_training(keeping, pictures):
    client, folder = keeping
    one, other = (file.read_bytes() for file in pictures[:2])
    assert client.get("/classes").json["feedback"] is True
    found = correct(client, "blue", one, other)
    assert (found.status, found.json) == (200, {"kept": 2})
    assert {file.read_bytes() for file in folder.glob("blue/*.png")} == {one, other}
    # The last word on a photo counts, and the same again is one photo.
    assert correct(client, "green thing", one).status == 200
    assert correct(client, "green thing", one).status == 200
    kept = sorted(file.relative_to(folder).parent.name for file in folder.rglob("*.png"))
    assert kept == ["blue", "green thing"]
    assert len(open_task(str(folder), test_fraction=0).train) == 2


def test_only_photos_of_known_classes_are_kept(keeping, pictures):
    client, folder = keeping
    good = pictures[0].read_bytes()
    for name in ("yellow", "../blue", "blue/../..", "", "BLUE"):
        assert "is no class" in correct(client, name, good).detail
    assert correct(client, "blue", good, b"no image").status == 400
    assert correct(client, "blue", png_header(9_000, 9_000)).status == 413
    assert correct(client, "blue", *[good] * 5).status == 413
    assert correct(client, "blue").status == 400
    assert client.ask("POST", "/feedback", good).status == 422
    assert not [*folder.rglob("*.*g")]


def test_a_page_of_another_server_can_have_nothing_kept(keeping, pictures, served):
    client, folder = keeping
    good = pictures[0].read_bytes()
    assert correct(client, "blue", good, Origin="http://evil.example").status == 403
    assert correct(client, "blue", good, Host="evil.example").status == 403
    own = f"http://127.0.0.1:{client.port}"
    with running(served, token="secret", feedback=open_feedback(folder, 10**6, ["a"])) as closed:
        assert correct(closed, "blue", good, Origin=own).status == 401
    assert not [*folder.rglob("*.png")]
    assert correct(client, "blue", good, Origin=own).status == 200


def test_there_is_an_end_to_what_is_kept(served, pictures, tmp_path, monkeypatch):
    one, other = (file.read_bytes() for file in pictures[:2])
    small = open_feedback(tmp_path / "kept", len(one) + len(other) - 1, served.class_names)
    with running(served, feedback=small) as client:
        assert correct(client, "blue", one).status == 200
        full = correct(client, "blue", other)
        assert (full.status, "no more room" in full.detail) == (507, True)
    monkeypatch.setattr("dapt.serve.feedback.MOST", 1)
    assert not replace(small, room=10**9).keep([other], "blue")
    assert len([*small.folder.rglob("*.png")]) == 1


def test_nothing_is_kept_unless_the_operator_says_so(client, run, pictures, tmp_path):
    assert client.get("/classes").json["feedback"] is False
    refused = correct(client, "blue", pictures[0].read_bytes())
    assert (refused.status, "keeps no photos" in refused.detail) == (404, True)
    with pytest.raises(UserError, match="none can be called 'a/b'"):
        open_feedback(tmp_path / "kept", 1, ["a/b"])
    assert not (tmp_path / "kept").exists()
    (tmp_path / "file").touch()
    told = runner.invoke(app, ["serve", str(run.path), "--feedback", str(tmp_path / "file")])
    assert (told.exit_code, "is a file; give a folder" in told.stderr) == (2, True)


# -- the page ------------------------------------------------------------------------------------


def test_drop_a_file_and_see_its_class(browser, client, served, pictures, tmp_path):
    address = f"http://127.0.0.1:{client.port}"
    browser.open(f"{address}/")
    until(lambda: browser.evaluate("document.querySelectorAll('#classes li').length") == 3)
    bad = tmp_path / "<i>bad.png"
    bad.write_bytes(b"no image")
    browser.drop(pictures[0], bad)
    until(lambda: browser.evaluate("document.querySelectorAll('article ol').length") == 1)
    until(lambda: browser.evaluate("document.querySelectorAll('.error').length") == 1)
    (best,) = predict_each(served.classifier, pictures[:1])
    shown = browser.evaluate("document.querySelector('article ol li').innerText").split("\n")
    assert shown[0] == best.classes[0][0]
    assert shown[-1] == f"{100 * best.classes[0][1]:.1f} %"
    assert "<i>bad.png cannot be read" in browser.evaluate(
        "document.querySelector('.error').innerText"
    )
    # The nearest support images are there and seen.
    count = "[...document.querySelectorAll('.nearest img')].filter((i) => i.naturalWidth).length"
    until(lambda: browser.evaluate(count) == 6)
    width = browser.evaluate("document.querySelector('ol .bar').getBoundingClientRect().width")
    assert width > 0
    # A paste does the same.
    browser.evaluate(
        "fetch('/support/0').then((r) => r.blob()).then((b) => { const d = new DataTransfer();"
        "d.items.add(new File([b], 'pasted.jpg', {type: 'image/jpeg'}));"
        "document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: d, bubbles: true})) })"
    )
    until(lambda: browser.evaluate("document.querySelectorAll('article ol').length") == 2)
    browser.look(390)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    browser.open(f"{address}/docs")
    until(lambda: browser.evaluate("document.querySelectorAll('article').length") == 6)
    assert "/predict" in browser.evaluate("document.body.innerText")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    outside = [u for u in browser.requested() if not u.startswith((address, "blob:", "about:"))]
    assert not outside
    assert [c for c in browser.complaints() if "400" not in c] == []


def test_answers_that_are_none_leave_a_sentence(browser, client, pictures):
    """As of uvicorn with too many clients, or of an error: plain text."""
    browser.open(f"http://127.0.0.1:{client.port}/")
    until(lambda: browser.evaluate("document.querySelectorAll('#classes li').length") == 3)
    browser.evaluate(
        "window.bad = {}; const real = fetch; window.fetch = (path, options) => {"
        "const status = bad[path.split(/[/?]/)[1]];"
        "return status ? Promise.resolve(new Response('plain', {status})) : real(path, options) }"
    )
    said = "document.getElementById('problem').innerText"
    for status, sentence in ((503, "The server is too busy (503)."),
                             (500, "The server failed (500).")):  # fmt: skip
        browser.evaluate(f"bad = {{classes: {status}}}; describe()")
        until(lambda s=sentence: browser.evaluate(said).startswith(s))
    browser.evaluate("bad = {}; describe()")
    until(lambda: browser.evaluate(said) == "")
    browser.evaluate("bad = {predict: 500}")
    browser.drop(pictures[0])
    error = "document.querySelector('.error')?.innerText || ''"
    until(lambda: browser.evaluate(error).startswith("The server failed (500)."))
    # Support images that did not come are asked for again.
    seen = "[...document.querySelectorAll('.nearest img')].filter((i) => i.naturalWidth).length"
    browser.evaluate("bad = {support: 503}")
    browser.drop(pictures[0])
    until(lambda: browser.evaluate("document.querySelectorAll('.nearest li').length") == 6)
    assert browser.evaluate(seen) == 0
    browser.evaluate("bad = {}")
    browser.drop(pictures[0])
    until(lambda: browser.evaluate(seen) == 6)


def test_the_page_asks_for_the_token(browser, served, pictures):
    with running(served, token="right") as client:
        browser.open(f"http://127.0.0.1:{client.port}/")
        hidden = "document.getElementById('token-form').hidden"
        until(lambda: browser.evaluate(hidden) is False)
        for token in ("wrong", "right"):
            browser.evaluate(f"document.getElementById('token').value = '{token}'")
            browser.evaluate("document.querySelector('#token-form button').click()")
            seen = {"wrong": "document.getElementById('problem').innerText",
                    "right": hidden}[token]  # fmt: skip
            until(lambda s=seen: browser.evaluate(s) in (True, "That is not the token."))
        browser.drop(pictures[0])
        until(lambda: browser.evaluate("document.querySelectorAll('.nearest img').length") == 6)
