"""Fetching data sets: from a server on this machine, with files that are made up."""

import hashlib
import http.server
import io
import tarfile
import threading

import pytest

from experiments import prepare
from sparse_flax import data

CONTENT = bytes(range(256)) * 40


class Handler(http.server.BaseHTTPRequestHandler):
  """Serves `files`; cuts off the first answer after `first` bytes, if that is a number."""

  files: dict[str, bytes] = {}  # noqa: RUF012
  asked: list[str | None] = []  # noqa: RUF012
  first: int | None = None

  def do_GET(self):
    content = self.files.get(self.path.lstrip("/"))
    if content is None:
      self.send_error(404)
      return
    asked = self.headers["Range"]
    self.asked.append(asked)
    start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
    self.send_response(206 if asked else 200)
    self.send_header("Content-Length", str(len(content) - start))
    self.end_headers()
    stop, Handler.first = self.first, None
    self.wfile.write(content[start:stop])

  def log_message(self, *args):
    pass


@pytest.fixture
def server(monkeypatch):
  monkeypatch.setattr(Handler, "asked", [])
  monkeypatch.setattr(Handler, "files", {})
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
    thread = threading.Thread(target=serving.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    thread.join()


def publish(server, name, content):
  Handler.files[name] = content
  return prepare.File(f"{server}/{name}", len(content), hashlib.sha256(content).hexdigest())


def test_a_download_that_was_cut_off_goes_on(server, tmp_path):
  file = publish(server, "some.bin", CONTENT)
  Handler.first = 1_000
  with pytest.raises(Exception, match=r"ended after|IncompleteRead"):
    prepare.fetch(file, tmp_path)
  part = tmp_path / "some.bin.part"
  have = part.stat().st_size
  assert not (tmp_path / "some.bin").exists() and have <= 1_000
  assert prepare.fetch(file, tmp_path).read_bytes() == CONTENT and not part.exists()
  assert Handler.asked == [None, f"bytes={have}-" if have else None]
  prepare.fetch(file, tmp_path)  # is there: not asked for again
  assert len(Handler.asked) == 2


def test_another_file_is_refused(server, tmp_path):
  file = publish(server, "some.bin", CONTENT)
  Handler.files["some.bin"] = CONTENT[::-1]
  with pytest.raises(ValueError, match="is not what was published, sha256"):
    prepare.fetch(file, tmp_path)
  (tmp_path / "some.bin").write_bytes(CONTENT[:-1])
  with pytest.raises(ValueError, match="has 10,239 bytes, not 10,240"):
    prepare.fetch(file, tmp_path)


def test_cifar10_is_fetched_unpacked_and_can_be_opened(server, tmp_path, monkeypatch, capsys):
  rows = bytes(3_073) * 40
  packed = io.BytesIO()
  with tarfile.open(fileobj=packed, mode="w:gz") as tar:
    for name in ("data_batch_1.bin", "test_batch.bin", "readme.html"):
      info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
      info.size = len(rows)
      tar.addfile(info, io.BytesIO(rows))
  known = prepare.SETS["cifar10"]
  file = publish(server, "cifar-10-binary.tar.gz", packed.getvalue())
  made = prepare.Set(known.config, (file,), known.licence, known.unpack)
  monkeypatch.setitem(prepare.SETS, "cifar10", made)
  assert prepare.main(["cifar10", f"--path={tmp_path / 'c'}"]) == 0
  said = capsys.readouterr().out
  assert "unpacked: 2 files" in said and f"--config=cifar10 --config.data.path={tmp_path}" in said
  assert not (tmp_path / "c" / "readme.html").exists()
  assert data.check("cifar10", path=str(tmp_path / "c"), seq_len=3_072) == []


def test_without_a_network_it_says_which_file_goes_where(server, tmp_path, monkeypatch, capsys):
  file = publish(server, "enwik8.zip", CONTENT)
  del Handler.files["enwik8.zip"]
  monkeypatch.setitem(prepare.SETS, "enwik8", prepare.Set("enwik8", (file,), ""))
  with pytest.raises(SystemExit, match="2"):
    prepare.main(["enwik8", f"--path={tmp_path}"])
  said = capsys.readouterr().err
  assert f"put enwik8.zip (10,240 bytes, sha256 {file.sha256}) into {tmp_path}" in said
  with pytest.raises(SystemExit, match="2"):
    prepare.main(["cifar"])
  assert "'cifar': no such set, there are cifar10, enwik8" in capsys.readouterr().err


def test_the_sets_are_listed(capsys):
  assert prepare.main([]) == 0
  said = capsys.readouterr().out
  for known in prepare.SETS.values():
    for file in known.files:
      assert file.url in said and file.sha256 in said and f"{file.num_bytes:,} bytes" in said
      assert len(file.sha256) == 64
