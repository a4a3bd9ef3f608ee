"""Launchers: flags, paths and printing around the library; no mathematics."""
