"""pip install -e . : what is installed is said in pyproject.toml."""

import setuptools

setuptools.setup()
