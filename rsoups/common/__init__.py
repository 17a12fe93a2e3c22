"""Errors, files, schemas and embedded assets, for every room."""
