"""Script that runs a command as root of a user namespace, as rootless containers do.

`python user_namespace.py USERS COMMAND...`, as root: the namespace has USERS users.
"""

import ctypes
import os
import sys

NEWUSER = 0x10000000
FIRST = 100_000
"""The namespace's root, outside."""


def main(users: int, command: list[str]) -> int:
    """Run the command and return its exit code."""
    libc = ctypes.CDLL(None, use_errno=True)
    entered, enter = os.pipe()
    mapped, map_ = os.pipe()
    child = os.fork()
    if child == 0:
        assert libc.unshare(NEWUSER) == 0, os.strerror(ctypes.get_errno())
        os.write(enter, b"x")
        os.read(mapped, 1)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        os.execv(command[0], command)
    os.read(entered, 1)
    for kind in ("uid", "gid"):
        with open(f"/proc/{child}/{kind}_map", "w") as file:
            file.write(f"0 {FIRST} {users}")
    os.write(map_, b"x")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
