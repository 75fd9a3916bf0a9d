"""Keys and values that leave one engine and arrive in another, over TCP, or in a file until tomorrow."""

from labkit.transfer.engines import export_kv, import_kv, load_session, save_session
from labkit.transfer.network import KVReceiver, send_kv
from labkit.transfer.pages import KVPages, TransferError

__all__ = [
    "KVPages",
    "KVReceiver",
    "TransferError",
    "export_kv",
    "import_kv",
    "load_session",
    "save_session",
    "send_kv",
]
