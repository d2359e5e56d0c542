"""`_info.json`, by which timm's WebDataset reader knows a set's shards (timm/data/readers/reader_wds.py, `_load_info`).

`timm.data.create_dataset("wds/", root=FOLDER, split=SPLIT)` then needs no patterns of file names.
"""

import json
import re

from penstock.streams.sets.manifest import Manifest

NAME = "_info.json"


def timm_info(manifest: Manifest, hints: str) -> bytes:
    """The file's content.

    Args:
        hints: where the set comes from and goes to; `val` or `test` as a word in it names its one split, else `train`.
    """
    words = set(re.split(r"[^a-z]+", hints.lower()))
    split = "validation" if words & {"val", "valid", "validation"} else "test" if "test" in words else "train"
    about = {
        "name": split,
        "filenames": [shard.name for shard in manifest.shards],
        "shard_lengths": [shard.samples for shard in manifest.shards],
        "num_samples": manifest.samples,
    }
    return (json.dumps({"splits": {split: about}}, indent=1) + "\n").encode()
