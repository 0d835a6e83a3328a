"""Hold an untrusted program apart: users, namespaces (bubblewrap's or ours), system calls, keyring.

`sandbox_process` calls this in processes of its own; it imports little, so that they start fast.
"""

import ctypes
import os
import pwd
import signal
import socket
import struct
from typing import Any

DISK, INODES = 2**26, 4096
"""Bytes and files that the sandbox's `/tmp` can hold."""
NOBODY = 65534
FEWEST_USERS = 2000
"""A user namespace that knows fewer users has none to spare."""

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/keyctl.h>
NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE, RELATIME = (
    0x1, 0x2, 0x4, 0x20, 0x1000, 0x4000, 0x40000, 0x200000,
)  # fmt: skip
SET_PDEATHSIG, SET_SECCOMP, SET_CHILD_SUBREAPER, SET_NO_NEW_PRIVS = 1, 22, 36, 38
KEYCTL, JOIN_SESSION_KEYRING = 250, 1

libc = ctypes.CDLL(None, use_errno=True)


# --- users and keys --------------------------------------------------------------------------


def own_user() -> int | None:
    """Return a user id that no other process has until this one ends; None if there is none.

    It owns no files. A name in the kernel's table of sockets reserves it. Only root can take it.
    """
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map") as lines:
        first, _, count = max((list(map(int, line.split())) for line in lines), key=lambda m: m[2])
    while count >= FEWEST_USERS:
        half = count // 2
        user = first + half + int.from_bytes(os.urandom(8), "little") % (half - 1)
        if not _has_account(user) and _reserve(user):
            return user
    return None


def _has_account(user: int) -> bool:
    try:
        return bool(pwd.getpwuid(user))
    except KeyError:
        return False


_reserved: list[socket.socket] = []


def _reserve(user: int) -> bool:
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0wrpo-sandbox-user-{user}")
    except OSError:
        return False
    _reserved.append(name)
    return True


def become(user: int) -> None:
    """Change to a user and its group, for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def leave_keyring() -> None:
    """Change to an empty session keyring; where the kernel refuses it, no key can be read."""
    libc.syscall(KEYCTL, JOIN_SESSION_KEYRING, None)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; no right can be gained any more."""
    check(libc.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    check(libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def adopt_orphans() -> None:
    """Become the parent of all descendants whose parent ends, so that none can leave."""
    check(libc.prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


# --- namespaces ------------------------------------------------------------------------------


OWN_MOUNTS, ALL = NEWNS, NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET


def enter_namespaces(root: str, user: int | None, spaces: int) -> None:
    """Leave the machine's mounts and, for children, its processes; mount memory at folder `root`.

    Without a user of its own (`own_user`), the run gets a user namespace.
    """
    outside = os.geteuid(), os.getegid()
    check(libc.unshare(spaces | (NEWUSER if user is None else 0)), "unshare")
    if user is None:  # in a user namespace it may do what follows, as the user that it was
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{NOBODY} {outside[0]} 1"),
            ("gid_map", f"{NOBODY} {outside[1]} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    _mount(None, "/", None, REC | PRIVATE)
    _mount("tmpfs", root, "tmpfs", NOSUID | NODEV, f"size={DISK},nr_inodes={INODES},mode=755")
    os.mkdir(f"{root}/tmp")  # nosec B108 # here and below, the /tmp of the run alone
    os.chmod(f"{root}/tmp", 0o1777)  # nosec B103 B108


def visible(python: str, prefix: str) -> list[str]:
    """The folders and links of the machine that Python needs, none inside another."""
    done: list[str] = []
    for path in (prefix, os.path.dirname(python), "/lib", "/lib64", "/usr/lib", "/usr/lib64"):
        if os.path.lexists(path) and not any(path.startswith(f"{d}/") or path == d for d in done):
            done.append(path)
    files = ("/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")
    return done + [file for file in files if os.path.exists(file)]


def build_root(root: str, python: str, prefix: str) -> None:
    """Make what Python needs visible in folder `root`, read only, and make it the root."""
    for path in visible(python, prefix):
        _bind(root, path)
    os.chroot(root)
    os.chdir("/tmp")  # nosec B108


def _bind(root: str, path: str) -> None:
    """Make a folder, file or link of the machine visible under `root`, read only."""
    there = root + path
    os.makedirs(os.path.dirname(there), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), there)
        return
    if os.path.isdir(path):
        os.mkdir(there)
    else:
        open(there, "x").close()
    _mount(path, there, None, BIND | REC)
    if not path.startswith("/dev/"):
        # Flags that the mount has may not be taken from it in a user namespace.
        kept = os.statvfs(there).f_flag & 0xF
        _mount(None, there, None, BIND | REMOUNT | RDONLY | RELATIME | NOSUID | NODEV | kept)


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    names = [name.encode() if name else None for name in (source, target, kind, data)]
    check(libc.mount(*names[:3], ctypes.c_ulong(flags), names[3]), f"mount {target}")


def bubblewrap(task: dict[str, Any], user: int | None, calls: int) -> list[str]:
    """Return the command that does the same by bubblewrap; `calls` is a file with the filter."""
    command = [
        task["bubblewrap"],
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
    ]
    command += ["--die-with-parent", "--seccomp", str(calls)]
    if user is None:
        command += ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    else:  # the program's process takes it, once it runs
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    paths = visible(task["python"], task["prefix"])
    parents = {path[:end] for path in paths for end in range(2, len(path)) if path[end] == "/"}
    for parent in sorted(parents):  # which users other than root may enter
        command += ["--perms", "0755", "--dir", parent]
    for path in paths:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    own = f"{task['root']}/tmp"  # nosec B108
    command += ["--bind", own, "/tmp", "--chdir", "/tmp", "--remount-ro", "/"]  # nosec B108
    return [*command, "--"]


# --- system calls ----------------------------------------------------------------------------

DENIED = {
    "memory that no process shows": (319, 447, 29, 30, 68, 64, 240),  # memfd_create, memfd_secret,
    # shmget, shmat, msgget, semget, mq_open
    "keys": (248, 249, 250),  # add_key, request_key, keyctl
    "namespaces and mounts": (272, 308, 165, 166, 155, 428, 429, 430, 432, 442),  # unshare, setns,
    # mount, umount2, pivot_root, open_tree, move_mount, fsopen, fsmount, mount_setattr
    "other processes": (101, 310, 311, 438),  # ptrace, process_vm_readv and writev, pidfd_getfd
    "parts of the kernel with many faults": (321, 298, 323, 425, 426, 427),  # bpf,
    # perf_event_open, userfaultfd, io_uring_*
}
CLONE, CLONE3, KILL, SOCKET = 56, 435, 62, 41
NAMESPACES = 0x7E020000
"""The flags of clone that make namespaces."""
FAMILIES = (1, 2, 10, 16)
"""Unix, IPv4, IPv6 and netlink sockets; others, such as vsock, are in no network namespace."""
X86_64, OTHER_ABI = 0xC000003E, 0x40000000
ALLOW, EPERM, ENOSYS, END = 0x7FFF0000, 0x50001, 0x50026, 0x80000000


def call_filter() -> bytes:
    """Return the seccomp filter, a BPF program (`man 2 seccomp`), for the system calls of x86-64.

    Raises:
        OSError: the machine has others.
    """
    if os.uname().machine != "x86_64":
        raise OSError("the filter of system calls is for x86-64")

    def load(offset: int) -> tuple[int, ...]:
        return 0x20, 0, 0, offset

    def equal(value: int, then: int = 0, other: int = 1) -> tuple[int, ...]:
        return 0x15, then, other, value

    def end(value: int) -> tuple[int, ...]:
        return 6, 0, 0, value

    code = [load(4), equal(X86_64, 1, 0), end(END), load(0), (0x35, 0, 1, OTHER_ABI), end(ENOSYS)]
    for number in (number for numbers in DENIED.values() for number in numbers):
        code += [equal(number), end(EPERM)]
    code += [equal(CLONE3), end(ENOSYS)]  # its flags are in memory; libraries then call clone
    code += [equal(CLONE, 0, 4), load(16), (0x45, 0, 1, NAMESPACES), end(EPERM), end(ALLOW)]
    code += [equal(KILL, 0, 4), load(16), equal(2**32 - 1), end(EPERM), end(ALLOW)]  # all it may
    families = [equal(family, len(FAMILIES) - n, 0) for n, family in enumerate(FAMILIES)]
    code += [equal(SOCKET, 0, len(FAMILIES) + 3), load(16), *families, end(EPERM), end(ALLOW)]
    return b"".join(struct.pack("HBBI", *line) for line in [*code, end(ALLOW)])


def filter_calls() -> None:
    """Apply the filter to this process and all that it starts."""
    code = ctypes.create_string_buffer(call_filter())
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(code))
    check(libc.prctl(SET_SECCOMP, 2, program, 0, 0), "seccomp")


def check(result: int, what: str) -> None:
    """Raise the OSError of a C function that returned an error."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
