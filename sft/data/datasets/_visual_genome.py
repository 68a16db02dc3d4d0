"""Images of Visual Genome: 108,077 JPEG files, named by their id without leading zeros.

The two official zips hold `VG_100K/<id>.jpg` and `VG_100K_2/<id>.jpg`, and an image is in one of them; repacked copies
hold all as `<id>.jpg` in one folder. Some files of VG_100K_2 are empty in some copies (170 were reported); those are
skipped when they are read.
"""

import os
import re
from pathlib import Path

from sft.core.images import local_image
from sft.core.sample import ImageRef, SkipSample


def image_of(image_id: object, folder: Path) -> ImageRef:
    """Return the image with this id, a whole number or its digits, below `folder`, or raise SkipSample."""
    if isinstance(image_id, bool) or not re.fullmatch("[0-9]{1,12}", str(image_id)):
        raise SkipSample("image id is not a number", detail=repr(image_id)[:200])
    for name in (f"VG_100K/{image_id}.jpg", f"VG_100K_2/{image_id}.jpg", f"{image_id}.jpg"):
        if os.path.isfile(folder / name):  # Path.is_file raises where a folder may not be entered
            return local_image(folder, name)
    raise SkipSample("image file missing", detail=f"{image_id}.jpg")
