"""System calls by name and machine, and the C library calls Python has no wrapper for."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

# name=x86-64/aarch64, "-" where a machine lacks the call; checked against the kernel's headers.
HARMLESS = """
read=0/63 write=1/64 open=2/- close=3/57 stat=4/- fstat=5/80 lstat=6/- poll=7/- lseek=8/62
mmap=9/222 mprotect=10/226 munmap=11/215 brk=12/214 rt_sigaction=13/134 rt_sigprocmask=14/135
rt_sigreturn=15/139 pread64=17/67 pwrite64=18/68 readv=19/65 writev=20/66 access=21/- pipe=22/-
select=23/- sched_yield=24/124 mremap=25/216 msync=26/227 mincore=27/232 madvise=28/233
dup=32/23 dup2=33/- pause=34/- nanosleep=35/101 getitimer=36/102 alarm=37/- setitimer=38/103
getpid=39/172 sendfile=40/71 exit=60/93 wait4=61/260 uname=63/160 fcntl=72/25 fsync=74/82
fdatasync=75/83 truncate=76/45 ftruncate=77/46 getdents=78/- getcwd=79/17 chdir=80/49
fchdir=81/50 rename=82/- mkdir=83/- rmdir=84/- creat=85/- unlink=87/- symlink=88/- readlink=89/-
chmod=90/- fchmod=91/52 umask=95/166 gettimeofday=96/169 getrlimit=97/163 getrusage=98/165
sysinfo=99/179 times=100/153 getuid=102/174 getgid=104/176 geteuid=107/175 getegid=108/177
getppid=110/173 getpgrp=111/- getgroups=115/158 getresuid=118/148 getresgid=120/150
getpgid=121/155 getsid=124/156 capget=125/90 rt_sigpending=127/136 rt_sigtimedwait=128/137
rt_sigsuspend=130/133 sigaltstack=131/132 utime=132/- statfs=137/43 fstatfs=138/44
getpriority=140/141 sched_getparam=143/121 sched_getscheduler=145/120
sched_get_priority_max=146/125 sched_get_priority_min=147/126 arch_prctl=158/- gettid=186/178
readahead=187/213 time=201/- futex=202/98 sched_getaffinity=204/123 getdents64=217/61
set_tid_address=218/96 restart_syscall=219/128 fadvise64=221/223 timer_create=222/107
timer_settime=223/110 timer_gettime=224/108 timer_getoverrun=225/109 timer_delete=226/111
clock_gettime=228/113 clock_getres=229/114 clock_nanosleep=230/115 exit_group=231/94
epoll_wait=232/- epoll_ctl=233/21 utimes=235/- waitid=247/95 openat=257/56 mkdirat=258/34
newfstatat=262/79 unlinkat=263/35 renameat=264/38 symlinkat=266/36 readlinkat=267/78
fchmodat=268/53 faccessat=269/48 pselect6=270/72 ppoll=271/73 set_robust_list=273/99
get_robust_list=274/100 utimensat=280/88 epoll_pwait=281/22 timerfd_create=283/85 eventfd=284/-
fallocate=285/47 timerfd_settime=286/86 timerfd_gettime=287/87 eventfd2=290/19
epoll_create1=291/20 dup3=292/24 pipe2=293/59 preadv=295/69 pwritev=296/70 getcpu=309/168
renameat2=316/276 getrandom=318/278 membarrier=324/283 copy_file_range=326/285 statx=332/291
rseq=334/293 close_range=436/436 faccessat2=439/439 epoll_create=213/- sendto=44/206
recvfrom=45/207 sendmsg=46/211 recvmsg=47/212 shutdown=48/210 getsockname=51/204
getpeername=52/205 setsockopt=54/208 getsockopt=55/209
"""
"""Calls a cell may make with any arguments."""
CONDITIONAL = """
clone=56/220 fork=57/- vfork=58/- clone3=435/435 execve=59/221 execveat=322/281 socket=41/198
socketpair=53/199 prctl=157/167 ioctl=16/29 kill=62/129 tkill=200/130 tgkill=234/131
prlimit64=302/261
"""
"""Calls whose arguments decide, or that are refused with a particular error."""
TRUSTED = """
pivot_root=155/41 mount_setattr=442/442 landlock_create_ruleset=444/444
landlock_add_rule=445/445 landlock_restrict_self=446/446 seccomp=317/277 pidfd_open=434/434
pidfd_getfd=438/438
"""
"""Calls the jail itself makes."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What differs between processor architectures."""

    name: str
    audit_arch: int
    """AUDIT_ARCH_* value that a seccomp filter sees."""
    column: int
    """Place of its numbers in the tables above."""


MACHINES = {
    "x86_64": Machine("x86_64", 0xC000003E, 0),
    "aarch64": Machine("aarch64", 0xC00000B7, 1),
}


@cache
def numbers(table: str, machine: Machine) -> Mapping[str, int]:
    """Return the numbers of the calls that a machine has.

    Examples
    --------
    >>> numbers("read=0/63 open=2/-", MACHINES["aarch64"])
    {'read': 63}
    """
    found = {}
    for entry in table.split():
        name, _, columns = entry.partition("=")
        number = columns.split("/")[machine.column]
        if number != "-":
            found[name] = int(number)
    return found


def this_machine() -> Machine:
    """Return the architecture this process runs on.

    Raises
    ------
    OSError
        If its system calls are in no table here.
    """
    name = platform.machine()
    if name not in MACHINES:
        raise OSError(f"no system call table for the architecture {name!r}")
    return MACHINES[name]


LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38


def check(result: int, what: str) -> int:
    """Return a C call's result, or raise the error it left behind.

    Raises
    ------
    OSError
        If the result is negative; ``what`` names the call.
    """
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def syscall(name: str, *arguments: object) -> int:
    """Make one of the `TRUSTED` calls; integers are passed as C longs.

    Raises
    ------
    OSError
        If the kernel refuses.
    """
    number = numbers(TRUSTED, this_machine())[name]
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return check(LIBC.syscall(ctypes.c_long(number), *values), name)


def prctl(option: int, value: int = 0) -> None:
    """Set an attribute of this process.

    Raises
    ------
    OSError
        If the kernel refuses.
    """
    arguments = [ctypes.c_ulong(a) for a in (option, value, 0, 0, 0)]
    check(LIBC.prctl(*arguments), f"prctl {option}")
