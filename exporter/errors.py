"""One class per exit code (3 is a verdict, no error). An error is one message: seen, expected, what to do."""

import errno

# What the system says of itself, and not of what it was asked.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE)
SYSTEM = (*DISK, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG)
# How torch, numpy, ONNX Runtime and the interpreter say that there is no memory.
NO_MEMORY = (
    "allocate memory",
    "not enough memory",
    "bad alloc",
    "bad_alloc",
    "start new thread",
    "pthread_create failed",
    "out of memory",
)


class ExporterError(Exception):
    """Base of every error that the command line turns into a message and an exit code."""

    exit_code = 5

    def __init__(self, seen: str, *, expected: str = "", todo: str = "") -> None:
        self.seen, self.expected, self.todo = seen, expected, todo
        parts = [seen]
        if expected:
            parts.append(f"expected: {expected}")
        if todo:
            parts.append(f"what to do: {todo}")
        super().__init__("\n".join(parts))


class ParityFailed(ExporterError):
    """The compared models differ by more than a gate allows, or a logit is not finite."""

    exit_code = 1


class UsageError(ExporterError):
    """A flag, an argument or an output directory that the command cannot use."""

    exit_code = 2


class InputRefused(ExporterError):
    """A missing, malformed, hostile, unsupported or mismatching input."""

    exit_code = 4


class EnvironmentLacking(ExporterError):
    """Disk, memory, network, a dependency, an execution provider or a port is missing."""

    exit_code = 5


def lacking(error: Exception) -> EnvironmentLacking | None:
    """An error that a disk or too little memory causes at any call, as what it is; None for every other error."""
    text = str(error)
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in NO_MEMORY):
        return EnvironmentLacking(
            f"there is not enough memory ({text.splitlines()[0][:200] if text else 'an allocation failed'})",
            todo="free memory or raise the limit, then run the same command again",
        )
    if isinstance(error, OSError) and error.errno in SYSTEM:
        where = f"{error.filename}: " if error.filename else ""
        return EnvironmentLacking(
            f"{where}{error.strerror}", todo="free or check the disk and its permissions, then run the command again"
        )
    return None
