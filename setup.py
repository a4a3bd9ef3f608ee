"""For tools that ask for a setup.py; everything is in pyproject.toml."""

import setuptools

setuptools.setup()
