"""Claims about download.py, tested with a server on 127.0.0.1 that misbehaves: bytes received are
kept, a damaged file is never used."""

import hashlib
import io
import random
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import data
from config import UsageError
from support import download

ROOT = Path(__file__).parents[2]
FOLDER = "cifar-10-batches-py"
NAME = "cifar-10-python.tar.gz"


def archive_bytes(seed=0):
    """A .tar.gz of FOLDER with one file of 200,000 random bytes, which do not compress."""
    content = random.Random(seed).randbytes(200_000)
    member = tarfile.TarInfo(f"{FOLDER}/batches.meta")
    member.size = len(content)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        tar.addfile(member, io.BytesIO(content))
    return made.getvalue()


GOOD, OTHER = archive_bytes(0), archive_bytes(1)


class Handler(BaseHTTPRequestHandler):
    """Answers each request as the first text left in server.script says, or as a good server."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.asked.append(self.headers.get("Range"))
        how = server.script.pop(0) if server.script else "fine"
        if how.isdigit():
            return self.send_error(int(how))
        body, start = server.body, 0
        if (wanted := self.headers.get("Range")) and "ignores Range" not in how:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body):
            self.send_response(416)
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if "gives no length" not in how:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest, half = body[start:], (len(body) - start) // 2
        if "corrupts" in how:
            rest = rest[:half] + bytes([rest[half] ^ 1]) + rest[half + 1 :]
        broken = any(word in how for word in ("drops", "truncates", "stalls", "waits"))
        self.wfile.write(rest[:half] if broken else rest)
        if "stalls" in how or "waits" in how:
            server.released.wait(20)
        if "waits" in how:
            self.wfile.write(rest[half:])
        if "drops" in how:
            deadline = time.time() + 5  # let the half arrive: a reset discards what is on its way
            arrived = start + half - 2**13  # up to 8 kB wait to be written
            while download.size(server.part) < arrived and time.time() < deadline:
                time.sleep(0.005)
            time.sleep(0.02)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(self.connection.detach())  # not closed politely: reset


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server of the archive GOOD, whose MD5 is expected; waits are hundredths of a second."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.script, server.asked, server.released = GOOD, [], [], threading.Event()
    server.part = tmp_path / (NAME + ".part")
    server.handle_error = lambda *args: None  # a client that is killed is part of the tests
    server.url = f"http://127.0.0.1:{server.server_port}/{NAME}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    archive = (server.url, hashlib.md5(GOOD).hexdigest(), FOLDER)
    monkeypatch.setitem(download.ARCHIVES, "cifar10", archive)
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def refusal(call, *args):
    """The message of the UsageError that the call raises, checked to be one line."""
    with pytest.raises(UsageError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def fetched(folder):
    """Fetch into the folder and check that all is there and nothing else is left."""
    assert download.fetch("cifar10", folder) == folder / FOLDER
    assert (folder / FOLDER / "batches.meta").read_bytes() == random.Random(0).randbytes(200_000)
    assert len(list((folder / FOLDER).iterdir())) == 1
    assert sorted(path.name for path in folder.iterdir()) == [FOLDER, NAME, NAME + ".lock"]


def in_a_process(server, folder):
    """A process of its own that fetches into the folder."""
    code = (f"from support import download; download.ARCHIVES = {download.ARCHIVES!r}; "
            f"download.fetch('cifar10', {str(folder)!r})")
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.DEVNULL, text=True)


def wait_for(condition):
    deadline = time.time() + 20
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


# --- a good connection ----------------------------------------------------------------------------


def test_an_archive_is_downloaded_once_unpacked_and_then_left_alone(server, tmp_path):
    fetched(tmp_path / "new" / "data")
    (tmp_path / "new" / "data" / NAME).unlink()
    assert download.fetch("cifar10", tmp_path / "new" / "data").is_dir()  # the folder is enough
    assert server.asked == [None]


def test_an_archive_already_there_is_unpacked_without_network(server, tmp_path):
    (tmp_path / NAME).write_bytes(GOOD)
    fetched(tmp_path)
    assert server.asked == []


# --- a bad connection -----------------------------------------------------------------------------


@pytest.mark.parametrize("how, reason", [
    ("drops", "Connection reset"),
    ("truncates", f"the connection closed after {len(GOOD) // 2:,} of {len(GOOD):,} bytes"),
    ("stalls", "timed out")])
def test_a_broken_connection_is_resumed_where_it_broke_with_a_line(
        server, tmp_path, capsys, monkeypatch, how, reason):
    if how == "stalls":  # a busy machine may be silent for a tenth of a second
        monkeypatch.setattr(download, "STALL", 1)
    server.script = [how]
    fetched(tmp_path)
    first, wanted = server.asked
    start, half = int(wanted.removeprefix("bytes=").removesuffix("-")), len(GOOD) // 2
    assert first is None and (0 < start <= half if how == "drops" else start == half)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(NAME) and reason in line
    assert line.endswith(f"resuming from byte {start:,} in 0.01 s")


def test_any_number_of_drops_is_survived_while_the_file_grows(server, tmp_path, capsys):
    server.script = ["drops"] * (2 * download.ATTEMPTS)
    fetched(tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 2 * download.ATTEMPTS


def test_each_wait_is_twice_the_last_and_the_attempts_end(server, tmp_path, capsys):
    server.script = ["503"] * 100
    message = refusal(download.fetch, "cifar10", tmp_path)
    assert "503" in message and f"put {NAME} or the folder {FOLDER} into {tmp_path}" in message
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[1] for line in lines] == ["0.01 s", "0.02 s", "0.04 s", "0.08 s"]
    assert len(server.asked) == download.ATTEMPTS


@pytest.mark.parametrize("code", ["500", "503", "429"])
def test_a_server_in_trouble_is_asked_again(server, tmp_path, code):
    server.script = [code, code]
    fetched(tmp_path)
    assert len(server.asked) == 3


@pytest.mark.parametrize("code", ["404", "403"])
def test_a_file_that_is_not_there_is_asked_for_once(server, tmp_path, capsys, code):
    server.script = [code] * 9
    assert code in refusal(download.fetch, "cifar10", tmp_path)
    assert len(server.asked) == 1 and capsys.readouterr().out == ""


def test_a_full_disk_ends_the_download_and_the_bytes_received_are_kept(server, tmp_path):
    resource = pytest.importorskip("resource")  # Windows cannot be made to refuse
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, hard))  # no file may grow beyond this
    try:
        message = refusal(download.fetch, "cifar10", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert "File too large" in message and "the 80,000 bytes received are kept" in message
    fetched(tmp_path)
    assert server.asked[-1] == "bytes=80000-"


def test_a_server_that_knows_no_ranges_sends_all_again(server, tmp_path):
    server.script = ["drops", "ignores Range"]
    fetched(tmp_path)


def test_a_server_that_knows_no_ranges_and_always_drops_is_given_up(server, tmp_path):
    server.script = ["drops, ignores Range"] * 99
    assert f"put {NAME}" in refusal(download.fetch, "cifar10", tmp_path)
    assert len(server.asked) == download.ATTEMPTS


@pytest.mark.parametrize("how", ["gives no length", "gives no length, truncates"])
def test_without_a_length_the_checksum_decides(server, tmp_path, how):
    server.script = [how]
    fetched(tmp_path)
    assert len(server.asked) == 1 + ("truncates" in how)


# --- a .part file that was there ------------------------------------------------------------------


def test_a_part_file_is_resumed(server, tmp_path):
    (tmp_path / (NAME + ".part")).write_bytes(GOOD[:70_000])
    fetched(tmp_path)
    assert server.asked == ["bytes=70000-"]


def test_a_part_file_that_is_whole_is_only_checked(server, tmp_path):
    (tmp_path / (NAME + ".part")).write_bytes(GOOD)
    fetched(tmp_path)
    assert server.asked == [f"bytes={len(GOOD)}-"]


@pytest.mark.parametrize("part", [GOOD + b"more", OTHER[:70_000]],
                         ids=["too long", "of another file"])
def test_a_part_file_that_does_not_fit_is_discarded(server, tmp_path, capsys, part):
    (tmp_path / (NAME + ".part")).write_bytes(part)
    fetched(tmp_path)
    assert server.asked == [f"bytes={len(part)}-", None]
    assert "downloading it again from the start" in capsys.readouterr().out


# --- the MD5 --------------------------------------------------------------------------------------


def test_a_file_damaged_on_the_way_is_downloaded_once_more(server, tmp_path, capsys):
    server.script = ["drops", "corrupts"]  # the damage is in what was appended
    fetched(tmp_path)
    assert "downloading it again from the start" in capsys.readouterr().out
    assert server.asked[-1] is None


def test_a_file_always_damaged_is_refused_and_not_kept(server, tmp_path):
    server.script = ["corrupts"] * 9
    message = refusal(download.fetch, "cifar10", tmp_path)
    assert "MD5" in message and f"put {NAME} or the folder {FOLDER} into {tmp_path}" in message
    assert len(server.asked) == 2
    assert [path.name for path in tmp_path.iterdir()] == [NAME + ".lock"]


def test_a_damaged_archive_of_the_user_is_refused_not_deleted(server, tmp_path):
    (tmp_path / NAME).write_bytes(GOOD[:-10])
    message = refusal(download.fetch, "cifar10", tmp_path)
    assert str(tmp_path / NAME) in message and "MD5" in message and "delete it" in message
    assert (tmp_path / NAME).read_bytes() == GOOD[:-10]
    assert not (tmp_path / FOLDER).exists() and server.asked == []


# --- no network, no writable folder ---------------------------------------------------------------


def test_without_data_and_network_one_line_says_what_to_put_where(tmp_path, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(download, "FIRST_WAIT", 0)
    message = refusal(data.load, "cifar10", "train", tmp_path)
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz (no route to host)" in message
    assert message.endswith(f"; put {NAME} or the folder {FOLDER} into {tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == [NAME + ".lock"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "data").write_text("a file")
    message = refusal(download.fetch, "cifar10", tmp_path / "data")
    assert f"cannot write to {tmp_path / 'data'}" in message


# --- several processes, killed processes ----------------------------------------------------------


def test_of_two_processes_one_downloads_and_the_other_waits_for_it(server, tmp_path):
    server.script = ["waits"]
    first = in_a_process(server, tmp_path)
    wait_for(lambda: server.asked)
    second = in_a_process(server, tmp_path)
    line = second.stdout.readline()
    assert line == f"waiting for another process that downloads {NAME}\n"
    server.released.set()
    assert (first.wait(20), second.wait(20)) == (0, 0)
    assert first.stdout.read() == second.stdout.read() == "" and len(server.asked) == 1
    fetched(tmp_path)


def test_a_killed_download_is_resumed_by_the_next_process(server, tmp_path):
    server.script = ["waits"]
    process, part = in_a_process(server, tmp_path), tmp_path / (NAME + ".part")
    wait_for(lambda: part.exists() and part.stat().st_size > 50_000)
    process.kill()  # SIGKILL: it cannot clean up
    process.wait()
    have = part.stat().st_size
    left = tmp_path / (FOLDER + ".unpacking") / FOLDER / "half"
    left.mkdir(parents=True)  # as by a process killed while unpacking
    start = time.time()
    fetched(tmp_path)  # at once: the lock went with the process
    assert time.time() - start < 20 and server.asked[1:] == [f"bytes={have}-"]


# --- unpacking ------------------------------------------------------------------------------------


def test_an_archive_that_leaves_its_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    archive = tmp_path / "data" / "x.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("../../outside"))
    assert "x.tar.gz" in refusal(download.unpack, archive, "x")
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "x.tar.gz"]


def test_an_archive_cut_short_leaves_no_half_of_a_folder(tmp_path):
    (tmp_path / NAME).write_bytes(GOOD[:100_000])
    assert str(tmp_path / NAME) in refusal(download.unpack, tmp_path / NAME, FOLDER)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
