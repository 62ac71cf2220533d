"""Gives up what a process that works on hostile data never needs: files, network, other processes, new rights. For good.

What was opened before stays usable, as do sockets that were inherited. Linux alone has the means, Landlock (5.13; the network since 6.7,
signals since 6.12) and namespaces, and neither needs any right. Where the kernel, or the rules around a container, lack one, the others
still hold. See landlock(7), user_namespaces(7) and prctl(2).
"""

import ctypes
import os

FILES, NETWORK, SIGNALS = "files", "network", "signals"
ALL = (FILES, NETWORK, SIGNALS)

_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_CREATE_RULESET, _RESTRICT_SELF = 444, 446  # the same numbers on x86-64 and ARM64
_VERSION_ALONE = 1
_SCOPE_ABSTRACT_SOCKETS, _SCOPE_SIGNALS = 1, 2


class _Ruleset(ctypes.Structure):
    """`struct landlock_ruleset_attr`. What is handled here and allowed by no rule is forbidden."""

    _fields_ = (("handled_access_fs", ctypes.c_uint64), ("handled_access_net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


def confine() -> list[str]:
    """From here on this process can open no file, reach no network and signal no other process; which of `ALL` the kernel could grant.

    Blocks for a moment; call it in a process of one thread. Never raises.
    """
    system = ctypes.CDLL(None, use_errno=True)
    has_no_network = system.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0  # its new network has no interface that is up
    if not hasattr(system, "prctl") or system.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return [NETWORK] if has_no_network else []
    version = max(0, system.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION_ALONE))
    is_ruled = version > 0 and _restrict(system, version)
    granted = {FILES: is_ruled, NETWORK: has_no_network or (is_ruled and version >= 4), SIGNALS: is_ruled and version >= 6}
    return [name for name in ALL if granted[name]]


def _restrict(system: ctypes.CDLL, version: int) -> bool:
    """Forbid all that this version of Landlock knows."""
    num_rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    ruleset = _Ruleset(
        (1 << num_rights) - 1,
        0b11 if version >= 4 else 0,  # to bind and to connect TCP sockets
        _SCOPE_ABSTRACT_SOCKETS | _SCOPE_SIGNALS if version >= 6 else 0,
    )
    size = 8 if version < 4 else 16 if version < 6 else 24
    descriptor = system.syscall(_CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(size), 0)
    if descriptor < 0:
        return False
    try:
        return bool(system.syscall(_RESTRICT_SELF, descriptor, 0) == 0)
    finally:
        os.close(descriptor)
