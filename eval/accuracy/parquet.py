"""Data sets in the hub's parquet files: lmms-lab/DocVQA, lmms-lab/textvqa and echo840/OCRBench.

The questions are read at once, images one row group at a time. What cannot be read costs only its
own samples: one row, or one row group. pyarrow is handed an open file, and any exception of its is
taken for damage, since a damaged file can make it raise almost anything.
"""

from __future__ import annotations

import io
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from eval.accuracy.data import Dataset
from eval.accuracy.records import Record, read_samples
from minivlm.errors import UserError, printable
from minivlm.files import open_file, reason
from minivlm.inputs.images import read_image

_MAX_ROWS = 1 << 20  # of all files; a few bytes can stand for more rows than any memory holds


@dataclass(frozen=True)
class _RowGroup:
    """A part of a parquet file that is read at once, and the index of its first sample."""

    file: Path
    number: int
    first: int


def read_parquet_files(files: Sequence[Path], split: str) -> Dataset:
    """Read the parquet files of one split, in order.

    Raises `UserError` without pyarrow, for a file that is damaged as a whole or lacks a column, and
    if no row can be used.
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(f"{files[0]}: reading parquet needs pyarrow (pip install 'minivlm[parquet]')") from None
    rows: list[Any] = []
    groups: list[_RowGroup] = []
    for file in files:
        for number, in_group in enumerate(_read_rows(file, _MAX_ROWS - len(rows))):
            groups.append(_RowGroup(file, number, len(rows)))
            rows += in_group
    folder = files[0].parent
    samples = read_samples(rows, split, f"{folder}: row", named_images=False)
    return Dataset.whole(str(folder), samples, _ParquetImages(groups))


def _read_rows(file: Path, most: int) -> list[list[Any]]:
    """The rows of each row group, without images; a `UserError` in place of each that cannot be read."""
    import pyarrow.parquet as pq

    wanted = {*Record.__struct_encode_fields__} - {"image"}
    groups: list[list[Any]] = []
    with open_file(file) as stream:
        try:
            table = pq.ParquetFile(stream)
            columns, metadata = table.schema_arrow.names, table.metadata
            sizes = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        except Exception as error:
            raise UserError(f"{file}: not a readable parquet file ({_reason(error)})") from None
        if missing := [name for name in ("question", "image") if name not in columns]:
            raise UserError(f"{file}: no column {missing[0]!r}")
        if min(sizes, default=0) < 0 or sum(sizes) > most:
            raise UserError(f"{file}: claims {sum(sizes)} rows (expected at most {_MAX_ROWS} in all files)")
        for number, size in enumerate(sizes):
            try:
                content = table.read_row_group(number, [name for name in columns if name in wanted])
            except Exception as error:
                problem = UserError(f"{file}: row group {number} cannot be read ({_reason(error)})")
                groups.append([problem] * size)
            else:
                groups.append([_row(content, index) for index in range(content.num_rows)])
    return groups


def _row(table: Any, index: int) -> Any:
    try:
        return {name: table.column(name)[index].as_py() for name in table.column_names}
    except Exception as error:  # text that is not UTF-8, a date that Python cannot express
        return UserError(f"row {index} cannot be read ({_reason(error)})")


class _ParquetImages:
    """Decodes one image of a list of row groups.

    The last row group stays in memory, since its neighbours follow.
    """

    def __init__(self, groups: Sequence[_RowGroup]) -> None:
        self._groups = groups
        self._loaded: _RowGroup | None = None
        self._cells: Any = None

    def __call__(self, index: int) -> Image.Image:
        group = self._groups[bisect(self._groups, index, key=lambda group: group.first) - 1]
        try:
            if group != self._loaded:
                self._load(group)
            cell = self._cells[index - group.first].as_py()
            data = cell.get("bytes") if isinstance(cell, dict) else cell
            if not isinstance(data, bytes):
                raise UserError("no image")
            return read_image(io.BytesIO(data), "image")
        except Exception as error:  # Pillow's and pyarrow's, on damaged data
            where = f"row {index - group.first} of row group {group.number}"
            raise UserError(f"{group.file}: {where}: {_reason(error)}") from None

    def _load(self, group: _RowGroup) -> None:
        import pyarrow.parquet as pq

        with open_file(group.file) as stream:
            self._cells = pq.ParquetFile(stream).read_row_group(group.number, ["image"]).column("image")
        self._loaded = group


def _reason(error: Exception) -> str:
    return printable(reason(error), 150)
