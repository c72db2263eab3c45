"""What commands remark of how adapters were read, and how a result lies in its files."""

import json
from collections.abc import Sequence

from jaxmerge import io
from jaxmerge.base import Adapter
from jaxmerge.inspection import conversion_remark
from jaxmerge.words import span


def format_remarks(format: str | None, adapters: Sequence[Adapter], result: Adapter, written: Adapter) -> list[str]:
    """What the user should know of what was read, and of what was written.

    Args:
        format: That was asked for.
        adapters: As they were read.
        result: What was made of them.
        written: The result as it was written.

    Returns:
        A line each.
    """
    remarks = [f"{adapter.metadata.name}: {words}" for adapter in adapters if (words := conversion_remark(adapter))]
    if (written.metadata.format, written.metadata.place) != (result.metadata.format, result.metadata.place):
        ranks = span({lora.rank for lora in written.modules.values()})
        remarks.append(f"written as {format}: {len(written.modules)} modules of rank {ranks}")
    if rank := io.rank_on_disk(written):
        remarks.append(f"filled up with zeros to rank {rank}, the one rank that the format has")
    left_out = [name for adapter in adapters for name in json.loads(adapter.metadata.provenance).get("left_out", [])]
    if left_out:
        remarks.append(f"not an adapter's, and not carried over: {', '.join(dict.fromkeys(left_out))}")
    return remarks
