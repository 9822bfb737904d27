"""The bytes around the records, which no checksum covers: torch leaves no choice there."""

from __future__ import annotations

from collections.abc import Iterator

from ..container import archive, torch_file
from ..container.extents import Extent
from ..container.torch_file import TorchFile
from ..errors import FormatError
from ..source.files import RangeReader, source_files


def differences(file: TorchFile) -> Iterator[str]:
    """What lies otherwise between the records of a file than torch.save writes it.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        plan, crc32s = torch_file.archive_of(file)
    except FormatError as error:
        yield str(error)
        return
    (now,) = source_files([file.path])
    if plan.length != now.length:
        yield f"it has {now.length} bytes, not the {plan.length} of its records"
        return
    with RangeReader() as reader:
        for offset, data in archive.frame(plan, crc32s):
            if reader.read(Extent(file.path, offset, len(data))) != data:
                yield f"it is damaged at or after byte {offset}, between its records"
                return
