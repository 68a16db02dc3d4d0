"""Prepared datasets on disk: samples, and their distinct images, as memory-mapped Arrow tables.

    STORE/<dataset>/samples/     key, messages [{role, content: [{type, text, image}]}]; image = row in images/
                    images/      sha256, bytes, path, width, height: each distinct image once, verified
                    encoded/     token ids by tokenizer and template, see sft.data.encoded_arrays
                    features/    what a frozen tower makes of the images, see sft.batches.feature_cache
                    image_keys.bin, image_order.bin  see sft.data.store.image_keys
                    image_files.jsonl  the image files that records name, with sizes, times and hashes
                    skips.jsonl  every record that was left out, with its reason
                    manifest.json  what was asked, raw files with sizes and hashes, counts, filtered and skipped by
                                   reason, licence, versions; written last

A store without a manifest is unfinished and is made again.

    write        raw files -> a finished store; what is checked on the way
    schedule     its pieces: which are finished, which are still to be written
    pieces       raw records -> a finished piece: the work of one process
    join         finished pieces -> the two tables, each image once
    read         the finished store
    image_keys   numbers of images, equal in every store
    image_files  what image files were like when they were read
    tables       the Arrow files
"""

from sft.data.store.pieces import Settings
from sft.data.store.read import MANIFEST, Store, is_store_folder
from sft.data.store.write import prepare_store

__all__ = ["MANIFEST", "Settings", "Store", "is_store_folder", "prepare_store"]
