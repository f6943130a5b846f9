"""Makers of hostile files. Nothing here runs an attack; each maker returns the bytes of a file."""
