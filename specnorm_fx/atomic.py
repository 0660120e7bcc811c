"""Files that stand at their place only once they are whole."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replaced"]


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a file that takes the place of ``path`` when the block has ended without an error.

    That is in a temporary folder beside ``path``, hence on its file system, where a file moves in one step.
    Whatever ends the program, and when, ``path`` is what it was or what it is to be. A killed program leaves
    the folder behind, ``.<name>.*``, which nothing reads. Other files left in the folder move before.

    Args:
        path: The file to write; an existing one is replaced.

    Yields:
        A path of the same name in the folder.

    Raises:
        OSError: ``path`` is a folder or a device, or its folder does not exist or cannot be written.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if path.exists() and not path.is_file():  # /dev/null would become a file, for all of the machine
            raise OSError("it is no regular file")
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise type(error)(
            f"{path} cannot be written: {error.strerror or error}. Give the path of a file in an existing, "
            f"writable folder."
        ) from error
    with folder as name:
        written = Path(name, path.name)
        yield written
        for file in sorted(written.parent.iterdir(), key=lambda file: file == written):
            file.replace(path.parent / file.name)
