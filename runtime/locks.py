"""Locks that a forked child finds free, whichever thread held them at the fork."""

from __future__ import annotations

import os
import threading


def fork_safe_lock() -> threading.Lock:
    """A lock for a module's own state, made once at import.

    A fork waits for it. Hooks run in the reverse order of imports, so whoever holds it may only call into modules
    that its own module imports: those locks are taken later by a fork, too.
    """
    lock = threading.Lock()
    os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
