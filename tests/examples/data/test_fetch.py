"""Downloads that break off, change, or never come."""

from __future__ import annotations

import errno
import http.server
import threading

import pytest

from examples.data.fetch import fetch
from server.demo.data import DataFolderError

CONTENT = bytes(range(256)) * 400


class Server(http.server.ThreadingHTTPServer):
    """Serves ``content`` with ranges; breaks off after ``cuts[0]`` bytes, then ``cuts[1]``, ..."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.cuts = []
        self.statuses = []
        self.ranges = True
        self.tag = '"one"'
        self.asked = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/file.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked, condition = self.headers.get("Range"), self.headers.get("If-Range")
        server.asked.append(asked)
        if server.statuses:
            self.send_error(server.statuses.pop(0))
            return
        first = 0
        if asked and server.ranges and condition == server.tag:
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
            if first >= len(server.content):
                self.send_error(416)
                return
            self.send_response(206)
            size = len(server.content)
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        else:
            self.send_response(200)
        body = server.content[first:]
        self.send_header("Content-Length", str(len(body)))
        if server.tag:
            self.send_header("ETag", server.tag)
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else len(body)
        self.wfile.write(body[:cut])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fetches_once(server, tmp_path):
    path = fetch(server.url, tmp_path / "deep" / "file.gz", pause_s=0.0)
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["file.gz"]
    fetch(server.url, path)
    assert len(server.asked) == 1


def test_goes_on_where_it_broke_off(server, tmp_path):
    server.cuts = [1000, 5000]
    path = fetch(server.url, tmp_path / "file.gz", pause_s=0.0)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000-", "bytes=6000-"]
    assert names(tmp_path) == ["file.gz"]


def test_another_run_goes_on_too(server, tmp_path):
    server.cuts = [1000]
    with pytest.raises(DataFolderError, match="1000 bytes are kept and another run goes on"):
        fetch(server.url, tmp_path / "file.gz", attempts=1)
    assert not (tmp_path / "file.gz").exists()
    assert fetch(server.url, tmp_path / "file.gz").read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=1000-"


def test_begins_anew_when_the_file_has_changed(server, tmp_path):
    server.cuts = [1000]
    with pytest.raises(DataFolderError):
        fetch(server.url, tmp_path / "file.gz", attempts=1)
    server.content, server.tag = CONTENT[::-1], '"two"'
    assert fetch(server.url, tmp_path / "file.gz").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("lacks", ["ranges", "tag"])
def test_begins_anew_where_the_server_cannot_go_on(server, tmp_path, lacks):
    if lacks == "ranges":
        server.ranges = False
    else:
        server.tag = ""
    server.cuts = [1000]
    assert fetch(server.url, tmp_path / "file.gz", pause_s=0.0).read_bytes() == CONTENT


def test_begins_anew_when_more_is_kept_than_there_is(server, tmp_path):
    (tmp_path / "file.gz.part").write_bytes(CONTENT + b"more")
    (tmp_path / "file.gz.part.identity").write_text(server.tag)
    assert fetch(server.url, tmp_path / "file.gz", pause_s=0.0).read_bytes() == CONTENT


def test_a_partial_file_of_unknown_version_is_not_trusted(server, tmp_path):
    (tmp_path / "file.gz.part").write_bytes(b"something else")
    assert fetch(server.url, tmp_path / "file.gz").read_bytes() == CONTENT
    assert server.asked == [None]


def test_an_answer_of_503_is_tried_again(server, tmp_path):
    server.statuses = [503]
    assert fetch(server.url, tmp_path / "file.gz", pause_s=0.0).read_bytes() == CONTENT


def test_an_answer_of_404_is_final(server, tmp_path):
    server.statuses = [404]
    with pytest.raises(DataFolderError, match="the server answered 404"):
        fetch(server.url, tmp_path / "file.gz")
    assert len(server.asked) == 1


def test_nobody_there(tmp_path):
    with pytest.raises(DataFolderError, match=r"cannot fetch http://127\.0\.0\.1:9/"):
        fetch("http://127.0.0.1:9/file.gz", tmp_path / "file.gz", attempts=2, pause_s=0.0)


def test_a_full_disk_is_named_and_what_came_is_kept(server, tmp_path, monkeypatch):
    import examples.data.fetch as module

    def fsync(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fsync)
    with pytest.raises(DataFolderError, match=r"is full; \d+ bytes of .* are kept"):
        fetch(server.url, tmp_path / "file.gz")
    monkeypatch.undo()
    assert fetch(server.url, tmp_path / "file.gz", pause_s=0.0).read_bytes() == CONTENT
