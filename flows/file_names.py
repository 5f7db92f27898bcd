"""Names of the user's files: how they are spelled, and which of them are the operating system's."""

from __future__ import annotations

import os
import unicodedata

SYSTEM = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information"}


def is_passed_over(name: str) -> bool:
    """Whether a file or folder is hidden, or the operating system's."""
    return name.casefold() in SYSTEM or name.startswith(".")


def text_of(text: str) -> str:
    """Without surrounding space, and composed: file systems differ in how they spell an accented letter."""
    return unicodedata.normalize("NFC", text.strip())


def shown(name: str) -> str:
    """A file's name as text that can be printed and written, with U+FFFD for bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")
