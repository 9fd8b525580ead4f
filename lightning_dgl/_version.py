"""The package version, importable without the package."""

__version__ = "0.1.0"
