"""Errors of the operating system as messages, for both sides of a transfer."""

import errno
from typing import Final

from hybridkex.errors import HybridkexError

_WORDS: Final = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than this file system or process may write",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ELOOP: "the path contains a symbolic link",
    errno.ENOTDIR: "something that is not a folder has this name",
    errno.EEXIST: "something else has this name",
    errno.EISDIR: "a folder has this name",
    errno.ENAMETOOLONG: "the file system does not accept a name or path of this length",
    errno.EILSEQ: "the file system does not accept the bytes of this name",
    errno.EINVAL: "the file system does not accept this name or value",
    errno.EMFILE: "this process has too many open files (see 'ulimit -n')",
    errno.ENFILE: "this machine has too many open files",
    errno.EBUSY: "a file system is mounted under this name; unmount it, or send under another name",
    errno.EIO: "the disk reports an error",
    errno.ENOSYS: "the file system does not support this operation",
    errno.ENOLCK: "the file system has no locks, which keep two transfers of one file apart",
    errno.EXDEV: "its folder is on another file system than the receiver's folder; receive into "
    "that folder itself",
    errno.ESTALE: "the network share has been replaced",
}


class NotStored(HybridkexError):
    """The receiver cannot or must not store a file; the message is for the user."""


def why(error: OSError, doing: str) -> str:
    """A system error as a message: what could not be done, and why."""
    reason = _WORDS.get(error.errno or 0, error.strerror or "unknown error")
    return f"cannot {doing}: {reason}"
