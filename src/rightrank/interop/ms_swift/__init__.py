"""ms-swift's callback `rightrank`: `swift sft … --external_plugins THIS_FILE --callbacks rightrank`.

ms-swift puts the folder of this file in front of the path of imports, so that the folder holds nothing else.
"""

from __future__ import annotations

from typing import Any

from swift.callbacks import callbacks_map

from rightrank.interop.smallest import SmallestAdapter


def rightrank(args: Any, trainer: Any) -> SmallestAdapter:
    """The callback of a trainer of ms-swift, which evaluates on the rows that it holds out."""
    return SmallestAdapter()


callbacks_map["rightrank"] = rightrank
