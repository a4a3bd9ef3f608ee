"""The samples of a run: how their files are called, and how they look as HTML."""

import base64
import dataclasses
import html
import itertools
import re
from collections.abc import Mapping
from collections.abc import Sequence

TEXT_BYTES = 3_000  # of each text
# The kinds of files that can be shown: their first bytes, and how they are told to a browser.
_KINDS = {".png": (b"\x89PNG\r\n", "image/png"), ".wav": (b"RIFF", "audio/wav"), ".txt": (b"", "")}
SUFFIXES = tuple(_KINDS)
PAGE = "report.html"  # in the folder of the samples
# STEM[-all|-NN[-given|-drawnN|-original]], as experiments.sample names its files, where STEM is
# (samples|completions)-seedN[_temperatureX][_top_kN][_top_pX][_runN].
_NAME = re.compile(
  r"(?P<stem>(?P<kind>samples|completions)-seed(?P<seed>\d+)"
  r"(?P<options>(_(temperature|top_k|top_p|run)[\d.]+(e[+-]\d+)?)*))"
  r"(-(?P<row>\d+|all)(-(?P<part>\w+))?)?"
)
_ORDER = {"given": "0", "original": "2"}  # what is drawn lies between


@dataclasses.dataclass(frozen=True)
class Sample:
  """A file: its name, and its bytes; None where there was no room for them."""

  name: str
  content: bytes | None


def free_stem(
  taken: Sequence[str], *, kind: str, seed: int, options: Mapping[str, int | float]
) -> str:
  """What the names of the files of one run of sampling begin with, and those of no other run.

  Args:
    taken: the names of the files that are there.
    kind: "samples" or "completions".
    seed: of the run.
    options: those of temperature, top_k and top_p that are not the default.
  """
  stem = f"{kind}-seed{seed}" + "".join(f"_{name}{value:g}" for name, value in options.items())
  matches = [_NAME.fullmatch(_stem(name)) for name in taken]
  stems = {match["stem"] for match in matches if match}
  numbered = (f"{stem}_run{n}" for n in itertools.count(2))
  return next(name for name in itertools.chain([stem], numbered) if name not in stems)


def as_older(page: str, *, command: str) -> str:
  """A page of the report that says that there are newer samples, and what makes it again."""
  note = (
    '<p class="none">This page is older than some of the samples in its folder, and does not show '
    f"them. It is made again by <code>{escape(command)}</code></p>"
  )
  return page if note in page else page.replace("<main>", f"<main>{note}", 1)


def to_html(samples: Sequence[Sample]) -> tuple[str, list[str]]:
  """A group for each run of sampling, with a line for each number.

  Args:
    samples: files as `experiments.sample` names them; others are left out.

  Returns:
    The HTML, empty without samples, and the names of files that are not shown.
  """
  groups, left_out = {}, []
  for sample in samples:
    match = _NAME.fullmatch(_stem(sample.name))
    if match is None or _suffix(sample.name) not in _KINDS:
      continue
    start, _ = _KINDS[_suffix(sample.name)]
    if sample.content is None or not sample.content.startswith(start):
      left_out.append(sample.name)
      continue
    part = match["part"] or ("all in one" if match["row"] == "all" else "")
    group = groups.setdefault((match["kind"], int(match["seed"]), match["options"]), {})
    group.setdefault(match["row"] or "", []).append((part, sample))
  parts = []
  for (kind, seed, options), rows in sorted(groups.items(), key=lambda group: group[0]):
    if kind == "completions":
      said = "Completions beside the originals"
      lines = [sorted(cells, key=_place_of) for _, cells in sorted(rows.items())]
    else:
      said = "Samples"
      lines = [[cell for _, cells in sorted(rows.items()) for cell in cells]]
    shown = "".join(map(_line, lines))
    described = re.sub(r"_([a-z_]+)", r", \1 ", options)
    parts.append(f"<div><h3>{said}, seed {seed}{described}</h3>{shown}</div>")
  return f'<div class="groups">{"".join(parts)}</div>' if parts else "", left_out


def _place_of(cell: tuple[str, Sample]) -> tuple[str, str]:
  part, _ = cell
  return _ORDER.get(part, "1"), part


def _line(cells: Sequence[tuple[str, Sample]]) -> str:
  shown = "".join(f"<figure>{_show(sample)}{_caption(part)}</figure>" for part, sample in cells)
  kind = "pictures" if all(_suffix(sample.name) == ".png" for _, sample in cells) else "texts"
  return f'<div class="samples {kind}">{shown}</div>'


def _caption(part: str) -> str:
  words = re.sub(r"(\d+)$", r" \1", part)
  return f"<figcaption>{escape(words)}</figcaption>" if words else ""


def _show(sample: Sample) -> str:
  suffix = _suffix(sample.name)
  if suffix == ".txt":
    cut = len(sample.content) - TEXT_BYTES
    remark = f"<em>and {cut:,} more bytes</em>" if cut > 0 else ""
    return f"<pre>{escape(sample.content[:TEXT_BYTES].decode(errors='replace'))}</pre>{remark}"
  data = base64.b64encode(sample.content).decode()
  source = f'src="data:{_KINDS[suffix][1]};base64,{data}"'
  if suffix == ".wav":
    return f"<audio controls {source}></audio>"
  return f'<img alt="{escape(sample.name)}" {source}>'


def escape(text: str) -> str:
  """Text as HTML, with a sign for what is no character to be seen."""
  seen = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
  return html.escape(seen)


def _stem(name: str) -> str:
  return name.rpartition(".")[0]


def _suffix(name: str) -> str:
  return "." + name.rpartition(".")[2]
