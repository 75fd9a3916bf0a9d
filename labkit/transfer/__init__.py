"""Keys and values that leave one engine and arrive in another, or in a file until tomorrow."""

from labkit.transfer.engines import export_kv, import_kv, load_session, save_session
from labkit.transfer.pages import KVPages, TransferError

__all__ = ["KVPages", "TransferError", "export_kv", "import_kv", "load_session", "save_session"]
