"""Shut a process into namespaces of its own: code_driver.py does so before it runs a generated program.

Within, there is no network, no other process, a root that can only be read, an empty home and own temporary
folders. The program has no privileges, also where the evaluator runs as root. Needs Linux 5.12 and user
namespaces, which some systems switch off.

This file must not import the package: the driver loads it from the file.
"""

import ctypes
import os
import signal

# Numbers of linux/mount.h, fcntl.h, prctl.h and of the system call, which Python does not name.
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 24, 38, 47
_TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/mnt", "/media")


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def enter(folder: str, homes: list[str], kept: list[str]) -> None:
    """Go on in a sandbox, as a process whose parent passes its exit status on.

    Args:
        folder: the one folder that may be written; it becomes the current folder.
        homes: folders that are empty in the sandbox.
        kept: folders within those that can still be read: the interpreter and its libraries.

    Raises:
        OSError: the system does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    os.unshare(os.CLONE_NEWUSER | os.CLONE_NEWNS | os.CLONE_NEWPID | os.CLONE_NEWNET | os.CLONE_NEWIPC)
    maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    for name, text in maps.items():
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    _mount(libc, None, "/", None, _REC | _PRIVATE)
    shown = [path for path in [*kept, folder] if os.path.isdir(path)]
    handles = {path: os.open(path, os.O_PATH) for path in shown}
    hidden = [path for path in (*_TEMPORARY, *homes) if os.path.isdir(path) and not os.path.islink(path)]
    for path in hidden:
        _mount(libc, "tmpfs", path, "tmpfs", _NOSUID | _NODEV, b"size=256m,mode=1777")
    for path, handle in handles.items():
        if any(path == place or path.startswith(place.rstrip("/") + "/") for place in hidden):
            os.makedirs(path, exist_ok=True)
            _mount(libc, f"/proc/self/fd/{handle}", path, None, _BIND | _REC)
        os.close(handle)
    if not os.path.ismount(folder):
        _mount(libc, folder, folder, None, _BIND)
    _read_only(libc, "/", True)
    for path in {folder, "/tmp", "/var/tmp", "/dev/shm"} & {folder, *hidden}:
        _read_only(libc, path, False)
    os.chdir(folder)
    status = _in_new_process(libc)
    if status is not None:
        os._exit(_code(status))
    for proc in (("proc", "proc"), ("tmpfs", "tmpfs")):  # a container may allow no new /proc: then none
        try:
            _mount(libc, proc[0], "/proc", proc[1], _NOSUID | _NODEV | _NOEXEC)
            break
        except OSError:
            if proc[0] == "tmpfs":
                raise
    # The first process of the namespace waits for the program, and everything that is left ends with it.
    status = _in_new_process(libc)
    if status is not None:
        os._exit(_code(status))
    os.setsid()
    _drop_privileges(libc)


def _in_new_process(libc: ctypes.CDLL) -> int | None:
    """Fork; return None in the child, and the child's wait status in the parent when the child has ended."""
    child = os.fork()
    if child == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        return None
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == child:
            return status


def _code(status: int) -> int:
    """Return an exit code that also tells of a signal: 128 and more, as shells do."""
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def _mount(
    libc: ctypes.CDLL, what: str | None, where: str, kind: str | None, flags: int, data: bytes | None = None
) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (what, where, kind)]
    if libc.mount(*encoded, ctypes.c_ulong(flags), data):
        number = ctypes.get_errno()
        raise OSError(number, f"mount {where}: {os.strerror(number)}")


def _read_only(libc: ctypes.CDLL, path: str, value: bool) -> None:
    attributes = _MountAttributes(set=_RDONLY) if value else _MountAttributes(clear=_RDONLY)
    how = ctypes.c_uint(_AT_RECURSIVE if value else 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    if libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), how, ctypes.byref(attributes), size):
        number = ctypes.get_errno()
        raise OSError(number, f"mount_setattr {path}: {os.strerror(number)}")


def _drop_privileges(libc: ctypes.CDLL) -> None:
    """Give up every capability, so that nothing of the sandbox can be undone."""
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0):
            break
    libc.prctl(_PR_CAP_AMBIENT, 4, 0, 0, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    none = (ctypes.c_uint32 * 6)()
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")
