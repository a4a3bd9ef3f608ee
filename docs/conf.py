"""Settings of the documentation site: `make docs` builds it into build/docs.

Every block of a page that begins with ```python is executed, all of one page in one process, and an
example that fails ends the build. Code that is only to be read is in a {code-block}.
"""

import os
import pathlib
import re

from sphinx.util import inspect

import pallas_kernels

ROOT = pathlib.Path(__file__).parents[1]
# Of the processes that run the examples: `configs` is in no installed package, and compiling takes
# most of the time (tests/conftest.py has the same flags, and why).
os.environ["PYTHONPATH"] = str(ROOT)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
  " --xla_cpu_parallel_codegen_split_count=1",
)

project = "sparse-flax"
author = "the authors of sparse-flax"
copyright = author
release = version = pallas_kernels.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["pictures"]
highlight_language = "none"  # of indented blocks: commands, drawings

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 120  # seconds of one example
nb_execution_raise_on_error = True
nb_merge_streams = True

autoclass_content = "both"  # the class and its __init__
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
default_role = "code"  # `x` in a docstring is code
napoleon_numpy_docstring = False
napoleon_attr_annotations = False  # the signature has them
maximum_signature_line_length = 80
toc_object_entries_show_parents = "hide"

smartquotes = False  # "a" is a string of Python
html_theme = "sphinx_book_theme"
html_title = "sparse-flax"
html_copy_source = html_show_sourcelink = False
html_theme_options = {
  "navbar_persistent": [],  # the side bar has a search
  "show_toc_level": 2,
  "use_download_button": False,
}

_AS_A_NOTEBOOK = "---\nfile_format: mystnb\nkernelspec: {name: python3}\n---\n"


def _python_is_executed(app, page: str, source: list[str]) -> None:
  """Pages have plain python blocks, which every reader of Markdown shows; here they are cells."""
  cells, count = re.subn(r"^```python$", "```{code-cell} python", source[0], flags=re.MULTILINE)
  if count:
    source[0] = _AS_A_NOTEBOOK + cells
    print(f"{page}: {count} examples", flush=True)


def _as_restructured_text(app, what, name, thing, options, lines: list[str]) -> None:
  """Docstrings are plain text: indented paragraphs are code, and `*` and `|` mean nothing."""
  if lines[:1] == ["Args:"] and not lines[1].startswith(" "):  # as high as the quotes
    end = next((n for n, line in enumerate(lines) if line in ("Raises:", "Returns:")), len(lines))
    lines[1:end] = [f"  {line}" if line else "" for line in lines[1:end]]
  if lines[:1] and lines[0].startswith("Create new instance of "):  # of any named tuple
    lines.clear()
  text, before, in_code = [], "", False
  for n, line in enumerate(lines):
    inner = line.startswith(" ")
    if inner and n and not lines[n - 1] and before and before[0] != " " and before[-1] != ":":
      text += ["::", ""]
      in_code = True
    in_code = in_code and (inner or not line)
    if n and lines[n - 1].strip() == "Returns:":  # napoleon takes what is before a colon for a type
      line = line.replace(line.strip(), f": {line.strip()}")
    if not in_code and not line.lstrip().startswith(">>>"):
      line = re.sub(r"(^ *|: )([A-Z]\.)", r"\1\\\2", line)  # "B." begins no list
      parts = line.split("`")
      parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
      line = "`".join(parts)
    text.append(line)
    before = line or before
  lines[:] = text


def _signature_of_init(app, what, name, thing, options, signature, returns):
  """Modules of NNX are made by their metaclass, whose arguments say nothing."""
  if what != "class" or signature != "(*args: Any, **kwargs: Any)":
    return None
  found = inspect.signature(thing.__init__, bound_method=True)
  text = inspect.stringify_signature(
    found, unqualified_typehints=True, show_return_annotation=False
  )
  return re.sub(r"<class '([\w.]+)'>", r"\1", text), None


def setup(app) -> None:
  app.connect("source-read", _python_is_executed)
  app.connect("autodoc-process-signature", _signature_of_init)
  app.connect("autodoc-process-docstring", _as_restructured_text, priority=0)  # before napoleon
