"""Demonstrations: record now, decrypt later. Only the commands know this room."""
