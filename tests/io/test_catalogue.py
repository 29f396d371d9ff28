"""Fetching, checking and trusting files of weights, against a server on this machine; the internet is never asked."""

import hashlib
import io
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn

from talk3d.errors import WeightsError
from talk3d.io import catalogue
from talk3d.io.catalogue import CATALOGUE, Published, PublishedFile, fetch, find, is_there, load_published

CONTENT = b"\x80\x02weights" * 1000


class Answers(BaseHTTPRequestHandler):
    def __init__(self, pages: Mapping[str, bytes], *rest: object) -> None:
        self.pages = pages
        super().__init__(*rest)  # pyright: ignore[reportArgumentType]

    def do_GET(self) -> None:
        body = self.pages.get(self.path)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        length = len(body) + (50 if self.path.endswith("short") else 0)
        if not self.path.endswith("unannounced"):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pages = {"/net.pth": CONTENT, "/short": CONTENT, "/page": b"\n<!doctype html>", "/unannounced": b"\x80" * 3_000_000, "/empty": b""}
    server = HTTPServer(("127.0.0.1", 0), partial(Answers, pages))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def entry(*urls: str, sha256: str | None = None, member: str | None = None) -> Published:
    files = tuple(PublishedFile(path=f"net/{url.rpartition('/')[2]}", url=url, size_bytes=len(CONTENT), sha256=sha256) for url in urls)
    return Published(name="net", files=files, licence="none", commercial=True, unlocks="tests", member=member)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Published]:
    entries: dict[str, Published] = {}
    monkeypatch.setattr(catalogue, "CATALOGUE", entries)
    return entries


def test_the_catalogue_says_what_people_need_to_know() -> None:
    wanted = {
        "lpips-alex",
        "lpips-vgg",
        "arcface",
        "syncnet",
        "sync-expert",
        "bisenet",
        "gfpgan",
        "wav2vec2",
        "hubert",
        "inception",
        "face-landmarker",
    }
    assert wanted <= CATALOGUE.keys() and all(name == found.name for name, found in CATALOGUE.items())
    places = [file.path for found in CATALOGUE.values() for file in found.files]
    assert len(set(places)) == len(places)
    for found in CATALOGUE.values():
        assert found.licence and found.unlocks and all(file.url.startswith("https://") for file in found.files)
        assert found.commercial or re.search("research|non-commercial", found.licence)
        for file in found.files:
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
            prefix = re.search(r"-([0-9a-f]{8})\.pth$", file.path)  # PyTorch's own files carry the start of their hash
            assert prefix is None or file.sha256 is None or file.sha256.startswith(prefix[1])


def test_face_landmarker_is_the_known_file(shared: Path) -> None:
    path = shared / "models" / "face_landmarker.task"
    if not path.is_file():
        pytest.skip("no face_landmarker.task beside the checkout")
    file = CATALOGUE["face-landmarker"].files[0]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256 and path.stat().st_size == file.size_bytes
    assert find("face-landmarker", path.parent) == path


@pytest.mark.parametrize("known_sha256", [hashlib.sha256(CONTENT).hexdigest(), None], ids=["known", "pinned"])
def test_fetch_puts_whole_files_in_place(tmp_path: Path, address: str, known: dict[str, Published], known_sha256: str | None) -> None:
    known["net"] = entry(f"{address}/net.pth", sha256=known_sha256)
    steps: list[tuple[str, int]] = []
    assert not is_there(known["net"], tmp_path)
    with pytest.raises(WeightsError, match="talk3d weights fetch net"):
        find("net", tmp_path)
    paths = fetch("net", tmp_path, lambda stage, step, total, values: steps.append((stage, step)))
    assert [path.read_bytes() for path in paths] == [CONTENT] and is_there(known["net"], tmp_path)
    assert find("net", tmp_path) == paths[0] and steps[-1] == ("net.pth, MB", 0)
    assert not list(tmp_path.rglob("*partial*"))
    pins = tmp_path / "sha256.json"
    assert pins.exists() == (known_sha256 is None)
    if known_sha256 is None:
        assert json.loads(pins.read_text()) == {"net/net.pth": hashlib.sha256(CONTENT).hexdigest()}
    assert fetch("net", tmp_path) == paths  # there already: checked, not fetched
    paths[0].write_bytes(CONTENT + b"!")
    for use in (find, fetch):
        with pytest.raises(WeightsError, match="is not the"):
            use("net", tmp_path)


def test_a_file_url_is_fetched_too(tmp_path: Path, known: dict[str, Published]) -> None:
    (tmp_path / "source").write_bytes(CONTENT)
    known["net"] = entry((tmp_path / "source").as_uri())
    assert fetch("net", tmp_path / "cache")[0].read_bytes() == CONTENT


def test_several_files_make_a_folder(tmp_path: Path, address: str, known: dict[str, Published]) -> None:
    known["net"] = entry(f"{address}/net.pth", f"{address}/unannounced")
    known["net"] = replace(known["net"], files=tuple(replace(file, size_bytes=3_000_000) for file in known["net"].files))
    fetch("net", tmp_path)
    assert find("net", tmp_path) == tmp_path / "net"


@pytest.mark.parametrize(
    ("page", "reason"),
    [("short", "ended after"), ("page", "web page"), ("unannounced", "more than 1 MB"), ("empty", "ended after 0"), ("nowhere", "Not Found")],
)
def test_what_goes_wrong_is_one_line_and_leaves_nothing(tmp_path: Path, address: str, known: dict[str, Published], page: str, reason: str) -> None:
    known["net"] = entry(f"{address}/{page}")
    with pytest.raises(WeightsError, match=reason) as caught:
        fetch("net", tmp_path)
    message = str(caught.value)
    assert "\n" not in message and f"{address}/{page}" in message and str(tmp_path / "net" / page) in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_wrong_hash_or_no_connection_says_so(tmp_path: Path, address: str, known: dict[str, Published]) -> None:
    known["net"] = entry(f"{address}/net.pth", sha256="0" * 64)
    with pytest.raises(WeightsError, match="is not the published file"):
        fetch("net", tmp_path)
    known["net"] = entry("http://127.0.0.1:9/net.pth")
    with pytest.raises(WeightsError, match="put it at"):
        fetch("net", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(WeightsError, match="no network 'mystery'"):
        fetch("mystery", tmp_path)
    (tmp_path / "sha256.json").write_text("[]")
    known["net"] = entry(f"{address}/net.pth")
    with pytest.raises(WeightsError, match=r"sha256\.json is damaged"):
        fetch("net", tmp_path)


def test_an_encrypted_address_never_leads_to_a_plain_one(tmp_path: Path, known: dict[str, Published], monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(io.BytesIO):
        url, headers = "http://elsewhere/net.pth", {}

    monkeypatch.setattr(catalogue.urllib.request, "urlopen", lambda request, timeout: Answer(CONTENT))
    known["net"] = entry("https://nowhere/net.pth")
    with pytest.raises(WeightsError, match="not encrypted"):
        fetch("net", tmp_path)
    assert not (tmp_path / "net" / "net.pth").exists()


def test_weights_load_strictly(tmp_path: Path, known: dict[str, Published]) -> None:
    known["net"] = entry("https://nowhere/net.pth", member="params")
    truth = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).requires_grad_(False)
    truth[0].weight.fill_(2)
    tensors = {f"trunk.{key}": value for key, value in truth.state_dict().items() if "num_batches" not in key}  # as old files have it
    path = tmp_path / "net.pth"
    torch.save({"params": tensors | {"head.weight": torch.zeros(3)}}, path)
    fresh = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).requires_grad_(False)
    load_published("net", fresh, path, prefix="trunk.")
    assert torch.equal(fresh[0].weight, truth[0].weight)
    for wrong in (nn.Sequential(nn.Linear(2, 4)), nn.Sequential(nn.Linear(2, 3))):
        with pytest.raises(WeightsError, match="does not fit"):
            load_published("net", wrong, path, prefix="trunk.")
    with pytest.raises(WeightsError, match="unexpected"):
        load_published("net", nn.Sequential(), path)
