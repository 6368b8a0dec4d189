"""One class per exit code. An error is one message: what was seen, what was expected, what to do."""


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


class NotEnoughEvidence(ExporterError):
    """Parity is inconclusive, a mutant survived, or the adapter is too small to verify."""

    exit_code = 3


class InputRefused(ExporterError):
    """A missing, malformed, hostile, unsupported or mismatching input."""

    exit_code = 4


class EnvironmentLacking(ExporterError):
    """Disk, memory, network, a dependency, an execution provider or a port is missing."""

    exit_code = 5
