"""Reading published file formats as rows, one at a time and in bounded memory.

Every reader adds two things to a row, for keys, messages and progress bars:
    "__from__"  file and line (or record, or member) it was read from: `train.jsonl:17`
    "__at__"    how much of the file was read by then, 0 to 1
Names like these are ours: what the data have under such a name is dropped.

A bad record is handed over as the reason to skip it (`SkipSample`). A file that is broken as a whole, cut off by a
failed download say, is a `UserError`: what it should have held cannot be counted. Nothing is fetched, nothing is
extracted to disk, and no pickle is ever opened.
"""

from sft.data.formats.arrow import read_arrow
from sft.data.formats.base64_object import ByteRange, index_base64_object, read_range
from sft.data.formats.content import kind_of
from sft.data.formats.csv_text import read_csv
from sft.data.formats.json_text import read_json, read_json_items, read_json_list, read_json_object, read_jsonl
from sft.data.formats.parquet import batches, read_parquet
from sft.data.formats.records import is_table, read_records, record_files
from sft.data.formats.rows import MAX_RECORD_BYTES, Row, find_files, max_record_bytes, record_limit, require_file
from sft.data.formats.tar import read_tar

__all__ = [
    "MAX_RECORD_BYTES",
    "ByteRange",
    "Row",
    "batches",
    "find_files",
    "index_base64_object",
    "is_table",
    "kind_of",
    "max_record_bytes",
    "read_arrow",
    "read_csv",
    "read_json",
    "read_json_items",
    "read_json_list",
    "read_json_object",
    "read_jsonl",
    "read_parquet",
    "read_range",
    "read_records",
    "read_tar",
    "record_files",
    "record_limit",
    "require_file",
]
