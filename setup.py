"""Builds the compiled backends; everything else about the package is in pyproject.toml."""

from setuptools import setup

setup()
