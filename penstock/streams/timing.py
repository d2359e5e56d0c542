"""Where the time of samples goes, from the worker that makes them to the rank that reports it (`Batch.timing`).

Readers and images keep running counts under these names; a micro-batch carries how far they went while it was made.
"""

from collections.abc import Mapping

READ, DECODE, AUGMENT = "read_seconds", "decode_seconds", "augment_seconds"
SAMPLES, BYTES = "samples", "bytes"  # samples made ready; bytes of encoded images read
RETRIES, FETCHED = "retries", "fetched_bytes"  # of addresses beyond this machine, as are the next
CACHE_HITS, CACHE_MISSES = "cache_hits", "cache_misses"  # units (shards or blocks) that were there, or were fetched
NAMES = (SAMPLES, READ, DECODE, AUGMENT, BYTES, RETRIES, FETCHED, CACHE_HITS, CACHE_MISSES)


def since(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """How far running counts went."""
    return {name: value - before.get(name, 0.0) for name, value in now.items()}


def per_sample(sums: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Figures for people, of sums over all ranks that took `seconds` together."""
    samples = sums[SAMPLES]
    if not samples:
        return {}
    found = {
        "read_ms": 1e3 * sums[READ] / samples,
        "decode_ms": 1e3 * sums[DECODE] / samples,
        "augment_ms": 1e3 * sums[AUGMENT] / samples,
        "read_mb_per_second": sums[BYTES] / 1e6 / seconds,
        "retries": sums[RETRIES],
    }
    if asked := sums[CACHE_HITS] + sums[CACHE_MISSES]:
        found["cache_hits"] = sums[CACHE_HITS] / asked
    if asked or sums[FETCHED]:
        found["fetched_mb_per_second"] = sums[FETCHED] / 1e6 / seconds
    return found
