"""Claims about download.py, made to a real server on 127.0.0.1 that misbehaves: what came is kept, what is damaged never used."""

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
from support import download
from config import UsageError

ROOT = Path(__file__).parents[2]
FOLDER = "cifar-10-batches-py"
NAME = "cifar-10-python.tar.gz"


def archive_bytes(seed=0):
    """A .tar.gz of FOLDER with one file of 200,000 random bytes, which do not compress; the same for the same seed but for the time."""
    content = random.Random(seed).randbytes(200_000)
    member = tarfile.TarInfo(f"{FOLDER}/batches.meta")
    member.size = len(content)
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        tar.addfile(member, io.BytesIO(content))
    return made.getvalue()


GOOD, OTHER = archive_bytes(0), archive_bytes(1)


class Handler(BaseHTTPRequestHandler):
    """Answers each request as the first text left in server.script says; without one, as a good server does."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        server.asked.append((self.headers.get("Range"), self.headers.get("If-Range")))
        how = server.script.pop(0) if server.script else "fine"
        if how.isdigit():
            return self.send_error(int(how))
        if "changes" in how:  # a new version, from this request on
            server.body, server.tag = OTHER, '"two"'
        body, start = server.body, 0
        wanted = self.headers.get("Range") if "ignores Range" not in how else None
        if wanted and (self.headers.get("If-Range", server.tag) == server.tag or "ignores If-Range" in how):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(body):
            self.send_response(416)
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start + ('misplaces' in how)}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", server.tag)
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
            deadline = time.time() + 5  # let the half arrive, for a reset throws away what is still on its way
            while download.size(server.part) < start + half - 2**13 and time.time() < deadline:  # up to 8 kB wait to be written
                time.sleep(0.005)
            time.sleep(0.02)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            socket.close(self.connection.detach())  # not closed politely: reset


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server of the archive GOOD, whose MD5 download.py expects; waiting is cut to hundredths of a second."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.tag, server.script, server.asked, server.released = GOOD, '"one"', [], [], threading.Event()
    server.part = tmp_path / (NAME + ".part")
    server.handle_error = lambda *args: None  # a client that is killed is part of the tests
    server.url = f"http://127.0.0.1:{server.server_port}/{NAME}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setitem(download.ARCHIVES, "cifar10", (server.url, hashlib.md5(GOOD).hexdigest(), FOLDER))
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
    code = f"from support import download; download.ARCHIVES['cifar10'] = {download.ARCHIVES['cifar10']!r}; download.fetch('cifar10', {str(folder)!r})"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def wait_for(condition):
    deadline = time.time() + 20
    while not condition():
        assert time.time() < deadline
        time.sleep(0.01)


# ---- what a good connection gives


def test_an_archive_is_downloaded_once_unpacked_and_then_left_alone(server, tmp_path):
    fetched(tmp_path / "new" / "data")
    (tmp_path / "new" / "data" / NAME).unlink()
    assert download.fetch("cifar10", tmp_path / "new" / "data").is_dir()  # the folder is enough
    assert server.asked == [(None, None)]


def test_an_archive_already_there_is_unpacked_without_network(server, tmp_path):
    (tmp_path / NAME).write_bytes(GOOD)
    fetched(tmp_path)
    assert server.asked == []


# ---- what is dropped is gone on with


@pytest.mark.parametrize("how, reason", [
    ("drops", "Connection reset"), ("truncates", f"the connection closed after {len(GOOD) // 2:,} of {len(GOOD):,} bytes"),
    ("stalls", "timed out")])
def test_a_broken_connection_is_taken_up_where_it_broke_with_a_line(server, tmp_path, capsys, monkeypatch, how, reason):
    if how == "stalls":
        monkeypatch.setattr(download, "STALL", 1)  # a busy machine may well be silent for a tenth of that
    server.script = [how]
    fetched(tmp_path)
    first, (wanted, version) = server.asked
    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
    half = len(GOOD) // 2
    assert first == (None, None) and version == '"one"' and (0 < start <= half if how == "drops" else start == half)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(NAME) and reason in line and line.endswith(f"trying again in 0.01 s, from byte {start:,} on")


def test_an_endless_row_of_drops_is_survived_while_the_file_grows(server, tmp_path, capsys):
    server.script = ["drops"] * (2 * download.ATTEMPTS)
    fetched(tmp_path)
    assert len(capsys.readouterr().out.splitlines()) == 2 * download.ATTEMPTS


def test_each_wait_is_twice_the_last_and_the_tries_end(server, tmp_path, capsys):
    server.script = ["503"] * 100
    message = refusal(download.fetch, "cifar10", tmp_path)
    assert "503" in message and f"put {NAME} or the folder {FOLDER} into {tmp_path}" in message
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[1].split(" s,")[0] for line in lines] == ["0.01", "0.02", "0.04", "0.08"]
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


def test_a_full_disk_is_not_tried_again_and_what_came_is_kept(server, tmp_path, capsys):
    resource = pytest.importorskip("resource")  # Windows cannot be made to refuse
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80_000, hard))  # the system refuses to write any file beyond this
    try:
        message = refusal(download.fetch, "cifar10", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    assert "File too large" in message and message.endswith("the 80,000 bytes that came are kept")
    assert len(server.asked) == 1 and capsys.readouterr().out == ""
    fetched(tmp_path)


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


# ---- a .part file of another time


def test_a_part_file_of_unknown_origin_is_gone_on_with(server, tmp_path):
    (tmp_path / (NAME + ".part")).write_bytes(GOOD[:70_000])
    fetched(tmp_path)
    assert server.asked == [("bytes=70000-", None)]


def test_an_answer_from_the_wrong_place_is_not_appended(server, tmp_path, capsys):
    server.script = ["truncates", "misplaces"]
    fetched(tmp_path)
    assert server.asked[-1] == (None, None) and "damaged" not in capsys.readouterr().out


def test_a_part_file_that_is_whole_is_only_checked(server, tmp_path):
    (tmp_path / (NAME + ".part")).write_bytes(GOOD)
    fetched(tmp_path)
    assert server.asked == [(f"bytes={len(GOOD)}-", None)]


@pytest.mark.parametrize("part", [GOOD + b"more", OTHER[:70_000]], ids=["too long", "of another file"])
def test_a_part_file_that_does_not_fit_is_thrown_away(server, tmp_path, capsys, part):
    (tmp_path / (NAME + ".part")).write_bytes(part)
    fetched(tmp_path)
    assert server.asked == [(f"bytes={len(part)}-", None), (None, None)]
    assert "fetched once more from the start" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["fine", "ignores If-Range"])
def test_two_versions_of_the_servers_file_are_never_spliced(server, tmp_path, monkeypatch, how):
    server.body, server.tag, server.script = OTHER, '"old"', ["truncates"]
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    refusal(download.fetch, "cifar10", tmp_path)
    server.body, server.tag, server.script = GOOD, '"new"', [how]
    monkeypatch.setattr(download, "ATTEMPTS", 5)
    seen = []
    check = download.md5
    monkeypatch.setattr(download, "md5", lambda path: seen.append(path.read_bytes()) or check(path))
    fetched(tmp_path)
    assert seen == [GOOD]  # no splice was ever put together
    assert server.asked[1] == (f"bytes={len(OTHER) // 2}-", '"old"')


def test_a_file_that_changes_into_a_wrong_one_is_refused(server, tmp_path):
    server.script = ["drops", "changes"]
    message = refusal(download.fetch, "cifar10", tmp_path)
    assert hashlib.md5(OTHER).hexdigest() in message and "twice" in message


# ---- checksum


def test_a_file_damaged_on_the_way_is_fetched_once_more(server, tmp_path, capsys):
    server.script = ["drops", "corrupts"]  # the damage is in what was appended
    fetched(tmp_path)
    assert "fetched once more from the start" in capsys.readouterr().out
    assert server.asked[-1] == (None, None)


def test_a_file_always_damaged_is_refused_and_not_kept(server, tmp_path):
    server.script = ["corrupts"] * 9
    message = refusal(download.fetch, "cifar10", tmp_path)
    assert "MD5" in message and f"put {NAME} or the folder {FOLDER} into {tmp_path}" in message
    assert len(server.asked) == 2
    assert not (tmp_path / FOLDER).exists() and not (tmp_path / NAME).exists() and not (tmp_path / (NAME + ".part")).exists()


def test_a_damaged_archive_of_the_user_is_refused_not_deleted(server, tmp_path):
    (tmp_path / NAME).write_bytes(GOOD[:-10])
    message = refusal(download.fetch, "cifar10", tmp_path)
    assert str(tmp_path / NAME) in message and "MD5" in message and "delete it" in message
    assert not (tmp_path / FOLDER).exists() and len((tmp_path / NAME).read_bytes()) == len(GOOD) - 10 and server.asked == []


# ---- without a network, without a place


def test_without_data_and_network_one_line_says_what_to_put_where(tmp_path, monkeypatch, capsys):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setattr(download, "FIRST_WAIT", 0)
    message = refusal(data.load, "cifar10", "train", tmp_path)
    assert "(no route to host)" in message and "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in message
    assert message.endswith(f"put cifar-10-python.tar.gz or the folder cifar-10-batches-py into {tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == [NAME + ".lock"]


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "data").write_text("a file")
    assert f"cannot write to {tmp_path / 'data'}" in refusal(download.fetch, "cifar10", tmp_path / "data")


# ---- several processes, killed processes


def test_of_two_processes_one_downloads_and_the_other_waits_and_finds_it(server, tmp_path):
    server.script = ["waits"]
    first = in_a_process(server, tmp_path)
    wait_for(lambda: server.asked)
    second = in_a_process(server, tmp_path)
    line = second.stdout.readline()
    assert line == f"another process is fetching {NAME}; waiting for it\n"
    server.released.set()
    assert (first.wait(20), second.wait(20)) == (0, 0)
    assert first.stdout.read() == second.stdout.read() == "" and len(server.asked) == 1
    fetched(tmp_path)


def test_a_killed_download_is_gone_on_with_by_the_next_process(server, tmp_path):
    server.script = ["waits"]
    process, part = in_a_process(server, tmp_path), tmp_path / (NAME + ".part")
    wait_for(lambda: part.exists() and part.stat().st_size > 50_000)
    process.kill()  # SIGKILL: nothing can be tidied up
    process.wait()
    have = part.stat().st_size
    left = tmp_path / (FOLDER + ".unpacking") / FOLDER / "half"  # as by a process killed while unpacking
    left.mkdir(parents=True)
    start = time.time()
    fetched(tmp_path)  # at once: the lock went with the process
    assert time.time() - start < 20 and server.asked[1:] == [(f"bytes={have}-", '"one"')]


# ---- unpacking


@pytest.mark.parametrize("safe_tarfile", [True, False])
def test_an_archive_that_leaves_its_folder_is_refused(tmp_path, monkeypatch, safe_tarfile):
    if not safe_tarfile:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
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
