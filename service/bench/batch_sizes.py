"""What a running server's `/metrics` says of the batches it has made, for its clients."""

import asyncio
from collections.abc import Mapping
from urllib.error import HTTPError
from urllib.request import urlopen

from prometheus_client.parser import text_string_to_metric_families

TIMEOUT_S = 30.0
NOT_FOUND = 404


async def batch_sizes(url: str) -> dict[str, float]:
    """How many batches there were so far, as `{upper bound of the size: batches}`.

    Of a balancer, which has no metrics of the services behind it, there is nothing to say.
    Raises OSError where the server does not answer.
    """
    text = await asyncio.to_thread(_metrics, url)
    cumulative = {
        sample.labels["le"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "tamiyo_batch_size_bucket"
    }
    sizes, seen = {}, 0.0
    for bound, count in cumulative.items():
        sizes[bound], seen = count - seen, count
    return sizes


def _metrics(url: str) -> str:
    try:
        with urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as response:
            text: str = response.read().decode()
    except HTTPError as error:
        if error.code != NOT_FOUND:
            raise
        return ""
    return text


def ranges(sizes: Mapping[str, float]) -> dict[str, float]:
    """`{"4.0": n}` as `{"3-4": n}`: the upper bounds as ranges, empty ones left out."""
    names, low = {}, 1
    for bound, count in sizes.items():
        if bound == "+Inf":
            name = f"{low}-"
        else:
            high = int(float(bound))
            name = str(high) if low == high else f"{low}-{high}"
            low = high + 1
        if count:
            names[name] = count
    return names
