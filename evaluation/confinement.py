"""What a process may still do once it has given up its rights: kernel limits on itself, for good, without being root.

`evaluation.judge` calls `confine` in the two processes in which a generated program and its tests run. Three mechanisms of
Linux, each enough for its part, and none that a program can undo from inside:

* seccomp: a list of the system calls that stay allowed. Sockets, new processes, signals to others, other programs' memory,
  raising a limit, new kernel interfaces: whatever is not on the list fails with `PermissionError`.
* Landlock (Linux 6.2 or newer): files can be read in a few folders, and written in one, flat: plain files only.
  Where the kernel has none, seccomp refuses every writing open instead, the one folder included.
* Resource limits: processor time, memory, open files, file size, no core dumps.

Nothing here imports a library beyond Python's own: it runs in an interpreter that is to start within milliseconds.
"""

import ctypes
import math
import os
import platform
import resource
import signal
import struct
from pathlib import Path

OPEN_FILES = 64
FILE_BYTES = 16 << 20

# The numbers of the allowed system calls on x86_64 and aarch64 (Linux, asm/unistd_64.h and asm-generic/unistd.h).
SYSCALLS = """
read 0 63, write 1 64, close 3 57, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, lseek 8 62, open 2 -,
openat 257 56, creat 85 -, stat 4 -, lstat 6 -, fstat 5 80, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48,
faccessat2 439 439, readlink 89 -, readlinkat 267 78, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50,
umask 95 166, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, fcntl 72 25, ioctl 16 29, poll 7 -, ppoll 271 73,
select 23 -, pselect6 270 72, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, eventfd2 290 19,
rename 82 -, renameat 264 38, renameat2 316 276, unlink 87 -, unlinkat 263 35, ftruncate 77 46, mmap 9 222, mprotect 10 226,
munmap 11 215, mremap 25 216, madvise 28 233, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
rt_sigtimedwait 128 137, sigaltstack 131 132, pause 34 -, alarm 37 -, getitimer 36 102, setitimer 38 103, nanosleep 35 101,
clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153,
getrusage 98 165, restart_syscall 219 128, getpid 39 172, getppid 110 173, gettid 186 178, getpgrp 111 -, getpgid 121 155,
getsid 124 156, getuid 102 174, geteuid 107 175, getgid 104 176, getegid 108 177, uname 63 160, sysinfo 99 179,
sched_yield 24 124, sched_getaffinity 204 123, getcpu 309 168, futex 202 98, set_robust_list 273 99, set_tid_address 218 96,
rseq 334 293, membarrier 324 283, getrandom 318 278, prctl 157 167, clone 56 220, kill 62 129, tgkill 234 131, wait4 61 260,
exit 60 93, exit_group 231 94
"""
ABSENT = "clone3 435 435, openat2 437 437"  # answered "no such call", so that the C library falls back to clone and openat
CHANGES_FILES = {"creat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "ftruncate"}
MACHINES = {"x86_64": (0, 0xC000003E, 317, 126), "aarch64": (1, 0xC00000B7, 277, 91)}  # column, audit id, seccomp, capset


def confine(
    *, folder: str, readable: list[str], landlock: bool, seconds: float, memory_mb: int, may_kill: list[int]
) -> None:
    """Take this process's rights away: files, network, processes, signals, memory and processor time.

    Args:
        folder: the one folder in which plain files may be made, read, changed and removed (only with Landlock).
        readable: folders and files that may be read (only with Landlock; without it reading is not limited).
        landlock: whether the kernel has it, as `landlock_available` says.
        seconds: processor time, all threads together, rounded up to whole seconds; then SIGXCPU, one second later SIGKILL.
        memory_mb: address space, in MiB.
        may_kill: the processes that may be sent signals.

    Raises:
        OSError: the kernel refuses one of the mechanisms; nothing may be run then.
    """
    cpu = math.ceil(seconds)
    for limit, soft, hard in (
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_AS, memory_mb << 20, memory_mb << 20),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
        (resource.RLIMIT_FSIZE, FILE_BYTES, FILE_BYTES),
    ):
        ceiling = resource.getrlimit(limit)[1]
        within = [value if ceiling == resource.RLIM_INFINITY else min(value, ceiling) for value in (soft, hard)]
        resource.setrlimit(limit, (within[0], within[1]))
    *_, seccomp, capset = MACHINES[platform.machine()]
    _syscall(capset, struct.pack("Ii", 0x20080522, 0), bytes(24))  # a root user's capabilities
    _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS: what lets an ordinary user take the next two steps
    if landlock:
        _restrict_files(folder, readable)
    code = _filter(may_kill, read_only=not landlock)
    buffer = ctypes.create_string_buffer(code, len(code))
    _syscall(seccomp, 1, 0, struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)))  # SECCOMP_SET_MODE_FILTER


def die_with(parent: int) -> None:
    """Be killed when the process `parent`, which started this one, ends in whatever way."""
    _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def hide_memory() -> None:
    """Other processes of the same user can no longer read this one's memory."""
    _prctl(4, 0)  # PR_SET_DUMPABLE


def landlock_available() -> bool:
    """Whether the kernel can confine files: Landlock, third version (Linux 6.2), the first to cover truncation."""
    try:
        return _syscall(444, None, 0, 1) >= 3  # LANDLOCK_CREATE_RULESET_VERSION
    except OSError:
        return False


_libc = ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: bytes | int | None) -> int:
    result: int = _libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in (number, *arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())} (system call {number})")
    return result


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))):
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())} (prctl {option})")


def _restrict_files(folder: str, readable: list[str]) -> None:
    write_file, read_file, read_dir, remove_file, make_file, truncate = (1 << bit for bit in (1, 2, 3, 5, 8, 14))
    rules = _syscall(444, struct.pack("Q", (1 << 15) - 1), 8, 0)  # whatever is not granted below is refused
    grants = dict.fromkeys(readable, read_file | read_dir)
    grants["/dev/null"] = read_file | write_file
    grants[folder] = read_file | read_dir | write_file | remove_file | make_file | truncate
    for path, rights in grants.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:  # a folder of other distributions
            continue
        allowed = rights if Path(path).is_dir() else rights & ~read_dir
        _syscall(445, rules, 1, struct.pack("=Qi", allowed, place), 0)
        os.close(place)
    _syscall(446, rules, 0)
    os.close(rules)


def _numbers(table: str) -> dict[str, int]:
    column = MACHINES[platform.machine()][0]
    rows = (row.split() for row in table.split(","))
    return {name: int(numbers[column]) for name, *numbers in rows if numbers[column] != "-"}


def _filter(may_kill: list[int], *, read_only: bool) -> bytes:
    """The seccomp program: 8 bytes per instruction of classic BPF, one block per system call, refusal at the end."""
    load, mask, if_equal, give = 0x20, 0x54, 0x15, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    refuse, absent = 0x00050000 | 1, 0x00050000 | 38  # SECCOMP_RET_ERRNO with EPERM, ENOSYS
    # name -> (argument, bits looked at, values of which one must be met)
    whole, writing = 0xFFFFFFFF, os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
    conditions = {
        "clone": (0, 0x10000, [0x10000]),  # CLONE_THREAD: threads, no processes
        "kill": (0, whole, may_kill),
        "tgkill": (0, whole, may_kill),
        "prctl": (0, whole, [15]),  # PR_SET_NAME
        "fcntl": (1, whole, [0, 1, 2, 3, 4, 1030]),  # F_DUPFD … F_SETFL, F_DUPFD_CLOEXEC: no owner, no signal, no lock
        "ioctl": (1, whole, [0x5401, 0x5451]),  # TCGETS (is it a terminal?), FIOCLEX
    }
    if read_only:
        conditions |= {"open": (1, writing, [0]), "openat": (2, writing, [0])}
    audit_id = MACHINES[platform.machine()][1]
    lines = [(load, 0, 0, 4), (if_equal, 1, 0, audit_id), (give, 0, 0, kill), (load, 0, 0, 0)]
    for name, number in _numbers(SYSCALLS).items():
        if name in conditions:
            argument, bits, values = conditions[name]
            block = [(load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits)]  # the low half; these arguments are 32 bits wide
            for value in values:
                block += [(if_equal, 0, 1, value), (give, 0, 0, allow)]
            block.append((give, 0, 0, refuse))
        else:
            block = [(give, 0, 0, refuse if read_only and name in CHANGES_FILES else allow)]
        lines += [(if_equal, 0, len(block), number), *block]
    for number in _numbers(ABSENT).values():
        lines += [(if_equal, 0, 1, number), (give, 0, 0, absent)]
    return b"".join(struct.pack("HBBI", *line) for line in [*lines, (give, 0, 0, refuse)])
