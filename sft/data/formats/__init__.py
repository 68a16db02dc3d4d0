"""Reading published file formats as rows, one at a time and in bounded memory.

Every reader adds two things to a row, for keys, messages and progress bars:
    "__from__"  file and line (or record, or member) it was read from: `train.jsonl:17`
    "__at__"    how much of the file was read by then, 0 to 1
Names like these are ours: what the data have under such a name is dropped.

A bad record is handed over as the reason to skip it (`SkipSample`). A file that is broken as a whole, cut off by a
failed download say, is a `UserError`: what it should have held cannot be counted. Nothing is fetched, nothing is
extracted to disk, and no pickle is ever opened.
"""

from sft.data.formats.json_text import read_json as read_json
from sft.data.formats.json_text import read_json_items as read_json_items
from sft.data.formats.json_text import read_jsonl as read_jsonl
from sft.data.formats.parquet import batches as batches
from sft.data.formats.parquet import read_parquet as read_parquet
from sft.data.formats.records import is_table as is_table
from sft.data.formats.records import read_records as read_records
from sft.data.formats.records import record_files as record_files
from sft.data.formats.rows import MAX_RECORD_BYTES as MAX_RECORD_BYTES
from sft.data.formats.rows import Row as Row
from sft.data.formats.rows import find_files as find_files
from sft.data.formats.rows import folder_of as folder_of
from sft.data.formats.rows import record_limit as record_limit
from sft.data.formats.rows import require_file as require_file
