"""Addresses of object stores: what they name, and how people are shown them."""

import os
import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from penstock.errors import InputError

SCHEMES = ("s3", "gs", "az", "https", "http", "hf")
FORMS = (
    "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, https://HOST/PATH or "
    "hf://datasets/OWNER/NAME[@REVISION]/PATH"
)
SECRETS = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|SIGNATURE|CREDENTIAL|SAS", re.IGNORECASE)
STORES = ("AWS_", "GOOGLE_", "AZURE_", "HF_")
PLACES = ("_FILE", "_PATH", "_URI")  # end the names of variables that say where a secret is
SHORT, LONG = 6, 16  # characters of a secret that is told from other words where it stands alone, and anywhere


@dataclass(frozen=True)
class Place:
    """Where a client finds a set."""

    kind: str  # s3, gs, az or https
    url: str  # without a slash at the end
    headers: dict[str, str] = field(default_factory=dict, repr=False)  # may hold a token

    @property
    def versioned(self) -> bool:
        """Whether the store keeps to If-Match. Other servers may not, or may take no weak tag for equal to itself."""
        return self.kind != "https"


def place(address: str) -> Place:
    """What an address names. Raises InputError for one that cannot be used, or holds a credential."""
    if _without_users(address) != address or any(secret in address for secret in _secrets(refused=True)):
        raise InputError(
            f"{redacted(address)} holds a credential, which would end up in logs and run folders; leave it out, and "
            "give it in the environment (AWS_ACCESS_KEY_ID, AZURE_STORAGE_ACCOUNT_KEY, HF_TOKEN, ...)"
        )
    scheme, _, rest = address.partition("://")
    rest = rest.rstrip("/")
    if any(part in ("", ".", "..") for part in rest.split("/")) or re.search(r"[\x00-\x20\\#]", rest):
        raise InputError(f"{address} is no address of a set; write {FORMS}")
    if scheme == "hf":
        return _hugging_face(address, rest)
    if scheme == "http" and urlsplit(address).hostname not in ("127.0.0.1", "localhost", "::1"):
        raise InputError(f"{address}: without https anyone between could change the data; write https://{rest}")
    return Place("https" if scheme == "http" else scheme, f"{scheme}://{rest}")


def _hugging_face(address: str, rest: str) -> Place:
    match = re.fullmatch(r"datasets/([\w.-]+/[\w.-]+)(?:@([^/]+))?((?:/.+)?)", rest)
    if match is None:
        raise InputError(f"{address} names no data set; write hf://datasets/OWNER/NAME[@REVISION]/PATH")
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{host}/datasets/{match[1]}/resolve/{match[2] or 'main'}{match[3]}"
    if not url.startswith("https://") and urlsplit(url).hostname not in ("127.0.0.1", "localhost"):
        raise InputError(f"HF_ENDPOINT is {redacted(host)}; it must begin with https://")
    token = os.environ.get("HF_TOKEN")
    return Place("https", url, {"Authorization": f"Bearer {token}"} if token else {})


def redacted(text: str) -> str:
    """Text without what may be a credential: users, passwords and queries of addresses; the environment's secrets."""
    text = _without_users(text)
    for secret in _secrets():
        anywhere = re.escape(secret)
        text = re.sub(anywhere if len(secret) >= LONG else rf"(?<![\w-]){anywhere}(?![\w-])", "***", text)
    return text


def _without_users(text: str) -> str:
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s@'\"]*@", r"\1***@", text)
    return re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s?'\"<>]*)\?[^\s'\"<>),]*", r"\1?***", text)


def _secrets(refused: bool = False) -> list[str]:
    """Values of the environment that may be credentials; with `refused`, those that surely are."""
    found = [(name, value) for name, value in os.environ.items() if name.startswith(STORES) and SECRETS.search(name)]
    found = [(name, value) for name, value in found if not name.endswith(PLACES)]
    if refused:
        return [value for name, value in found if len(value) >= LONG and not name.endswith("ACCESS_KEY_ID")]
    return [value for _, value in found if len(value) >= SHORT]
