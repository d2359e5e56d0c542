"""Sets in object stores: s3://, gs://, az://, https:// and hf:// addresses.

A process of its own talks to the store (`fetcher`), since client libraries with threads do not survive the fork that
starts a rank's workers. It keeps what it fetches in a cache on disk that all ranks and workers of a machine share, and
workers read from there (`client`).
"""
