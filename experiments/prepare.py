"""Fetches the data sets of the paper's models, checks sizes and digests, and says how to train.

  python -m experiments.prepare                        the sets: files, bytes, licences
  python -m experiments.prepare cifar10 [--path=data/cifar10]

A download that was cut off goes on where it ended. What is there already is checked, not fetched.
Where there is no network: the same files, put into the folder by hand, are checked and unpacked.
"""

import dataclasses
import hashlib
import http.client
import os
import pathlib
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence

from experiments import cli

BLOCK = 2**20  # bytes at a time
SECONDS = 60  # without a byte


@dataclasses.dataclass(frozen=True)
class File:
  """One that is published."""

  url: str
  num_bytes: int
  sha256: str

  @property
  def name(self) -> str:
    return self.url.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class Set:
  """A data set.

  Attributes:
    config: that trains on it.
    files: of it.
    licence: in a few words.
    unpack: (archive, folder) -> names that are in the folder now; None: the files are read as they
      are.
  """

  config: str
  files: tuple[File, ...]
  licence: str
  unpack: Callable[[pathlib.Path, pathlib.Path], Iterator[str]] | None = None


def _unpack_cifar10(archive: pathlib.Path, folder: pathlib.Path) -> Iterator[str]:
  with tarfile.open(archive) as tar:
    for member in tar:
      if member.isfile() and member.name.endswith(".bin"):
        member.name = pathlib.PurePosixPath(member.name).name
        tar.extract(member, folder, filter="data")
        yield member.name


def _unpack_recordings(archive: pathlib.Path, folder: pathlib.Path) -> Iterator[str]:
  with zipfile.ZipFile(archive) as contents:
    for member in contents.infolist():
      if member.filename.lower().endswith(".wav"):
        yield contents.extract(member, folder)


SETS = {
  "cifar10": Set(
    "cifar10",
    (
      File(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
      ),
    ),
    "none formal, for research; cite Krizhevsky 2009",
    _unpack_cifar10,
  ),
  "enwik8": Set(
    "enwik8",
    (
      File(
        "https://mattmahoney.net/dc/enwik8.zip",
        36_445_475,
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
      ),
    ),
    "GFDL and CC BY-SA, by Wikipedia's authors",
  ),
  "imagenet64": Set(
    "imagenet64",
    (
      File(
        "http://image-net.org/small/train_64x64.tar",
        12_112_588_800,
        "e2a2c1947a748d0d256e98e6d82800d855441dc9e4de2e71a773f1324c4524d7",
      ),
      File(
        "http://image-net.org/small/valid_64x64.tar",
        477_255_680,
        "eeac03ec4f585baf871d2b4cb9c974bfe345e74878a74e5820fe6eb1041629cd",
      ),
    ),
    "ImageNet's terms: research, not commercial",
  ),
  # Not what the paper has, which is not published: piano recordings that are.
  "maestro": Set(
    "audio",
    (
      File(
        "https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/maestro-v3.0.0.zip",
        108_445_099_632,
        "6680fea5be2339ea15091a249fbd70e49551246ddbd5ca50f1b2352c08c95291",
      ),
    ),
    "CC BY-NC-SA 4.0",
    _unpack_recordings,
  ),
}


def table() -> str:
  """What there is to fetch."""
  lines = []
  for name, known in SETS.items():
    lines.append(f"{name}: for --config={known.config}; licence: {known.licence}")
    lines += [
      f"  {file.url}\n    {file.num_bytes:,} bytes, sha256 {file.sha256}" for file in known.files
    ]
  return "\n".join(lines)


def fetch(file: File, folder: pathlib.Path) -> pathlib.Path:
  """The file in the folder, whole and checked; a part of it is NAME.part.

  Raises:
    ValueError: it is not the published file.
    OSError: there is no network, or the address does not answer.
  """
  path, part = folder / file.name, folder / f"{file.name}.part"
  if path.exists():
    _check(path, file)
    return path
  have = part.stat().st_size if part.exists() else 0
  if have < file.num_bytes:
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
      goes_on = answer.status == 206  # else the server sends the file from its first byte
      with part.open("ab" if goes_on else "wb") as out:
        _copy(answer, out, file, done=have if goes_on else 0)
  _check(part, file)
  part.rename(path)
  return path


def _copy(answer, out, file: File, *, done: int) -> None:
  begin, before = time.monotonic(), done
  while block := answer.read(BLOCK):
    out.write(block)
    done += len(block)
    if done > file.num_bytes:
      raise ValueError(f"{file.url} has more than the published {file.num_bytes:,} bytes")
    if sys.stderr.isatty():
      rate = (done - before) / max(time.monotonic() - begin, 1e-3)
      left = (file.num_bytes - done) / max(rate, 1)
      line = f"{file.name}: {done / 1e6:,.0f} of {file.num_bytes / 1e6:,.0f} MB"
      print(f"\r{line}, {rate / 1e6:.1f} MB/s, {left:,.0f} s left\033[K", end="", file=sys.stderr)
  if sys.stderr.isatty():
    print("\r\033[K", end="", file=sys.stderr)
  if done < file.num_bytes:
    raise ConnectionError(
      f"{file.url} ended after {done:,} of {file.num_bytes:,} bytes: call this again"
    )


def _check(path: pathlib.Path, file: File) -> None:
  size = path.stat().st_size
  if size != file.num_bytes:
    raise ValueError(
      f"{path} has {size:,} bytes, not {file.num_bytes:,}: delete it, and call this again"
    )
  with path.open("rb") as content:
    found = hashlib.file_digest(content, "sha256").hexdigest()
  if found != file.sha256:
    raise ValueError(
      f"{path} is not what was published, sha256 {found}: delete it, and call this again"
    )


def run(name: str, path: str) -> None:
  """Fetches, checks and unpacks one set, and says how to train on it.

  Raises:
    ValueError: an unknown name, or another file than the published one.
  """
  if name not in SETS:
    raise ValueError(f"{name!r}: no such set, there are {', '.join(SETS)}")
  known, folder = SETS[name], pathlib.Path(path or os.path.join("data", name))
  folder.mkdir(parents=True, exist_ok=True)
  for file in known.files:
    try:
      archive = fetch(file, folder)
    except (
      urllib.error.URLError,
      http.client.HTTPException,
      ConnectionError,
      TimeoutError,
    ) as error:
      if isinstance(error, urllib.error.HTTPError):
        error.close()
      raise ValueError(
        f"{file.url}: {getattr(error, 'reason', error)}; or put {file.name} ({file.num_bytes:,} "
        f"bytes, sha256 {file.sha256}) into {folder}, and call this again"
      ) from error
    print(f"{archive}: {file.num_bytes:,} bytes, as published", flush=True)
    if known.unpack:
      print(f"unpacked: {sum(1 for _ in known.unpack(archive, folder)):,} files", flush=True)
  print(
    f"To train: python -m experiments.train --config={known.config} --config.data.path={folder}"
  )


def main(argv: Sequence[str]) -> int:
  parser = cli.Parser(__doc__)
  parser.add_argument("name", nargs="?", help=f"one of {', '.join(SETS)}; none: lists them")
  parser.add_argument("--path", help="the folder; default: data/NAME")
  args = parser.parse_args(argv)
  if args.name is None:
    print(table())
    return 0
  with cli.readable_errors():
    run(args.name, args.path)
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
