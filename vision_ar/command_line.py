"""What the commands share: an error of the user is one line, with exit code 2."""

from __future__ import annotations

import argparse
import pickle
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

USER_ERRORS = (ValueError, TypeError, OSError, RuntimeError, ImportError, pickle.UnpicklingError)
"""What wrong arguments, files and settings end in."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Say what was wrong and leave."""
        fail(message)


def fail(error: BaseException | str) -> NoReturn:
    """Print one line to the error stream and leave with code 2."""
    print("error: " + explain(error), file=sys.stderr)
    raise SystemExit(2) from (error if isinstance(error, BaseException) else None)


def explain(error: BaseException | str) -> str:
    """The one line of an error; errors of the system name the file without their number."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def check_writable(out: Path) -> None:
    """Raise when the folder cannot be made or written, before any work is done; leave nothing behind."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written, got {out}: {error.strerror}") from error
    finally:
        for folder in missing:
            if folder.is_dir():
                folder.rmdir()
