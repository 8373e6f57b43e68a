"""What checks found: a finding for each check of each cell, and one error that names those that failed."""

from collections.abc import Callable
from dataclasses import dataclass, field

from editkit.errors import EditkitError


@dataclass(frozen=True)
class Finding:
    """One check of one cell (a method on a family in a dtype). `problem`: "" where it holds."""

    check: str
    cell: str
    problem: str = ""
    refused: bool = False  # the method does not take the cell, and said why in one EditkitError

    def __str__(self) -> str:
        return f"{self.cell}: {self.check}" + (f": {self.problem}" if self.problem else "")


@dataclass
class Conformance:
    """The findings about `what`. `print(found)` shows a line for each that failed or was refused."""

    what: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def failed(self) -> list[Finding]:
        """Those that do not hold."""
        return [each for each in self.findings if each.problem and not each.refused]

    @property
    def refused(self) -> list[Finding]:
        """Cells that were refused with one clear error."""
        return [each for each in self.findings if each.refused]

    def run(self, check: str, cell: str, body: Callable[[], None]) -> bool:
        """Run one check; whether it holds. A failed assertion or an exception is what the finding says."""
        try:
            body()
        except AssertionError as error:
            self.findings.append(Finding(check, cell, str(error) or "it does not hold"))
        except Exception as error:
            self.findings.append(Finding(check, cell, f"{type(error).__name__}: {error}"))
        else:
            self.findings.append(Finding(check, cell))
        return not self.findings[-1].problem

    def refuse(self, cell: str, error: EditkitError) -> None:
        """Note that a cell was refused."""
        self.findings.append(Finding("computed", cell, str(error), refused=True))

    def require(self) -> "Conformance":
        """Itself, or AssertionError that names every check that failed."""
        if self.failed:
            named = "\n".join(f"  {each}" for each in self.failed)
            raise AssertionError(f"{self.what} fails {len(self.failed)} of {len(self.findings)} checks:\n{named}")
        return self

    def __str__(self) -> str:
        held = len(self.findings) - len(self.failed) - len(self.refused)
        counts = f"{held} checks hold, {len(self.failed)} fail, {len(self.refused)} cells refused"
        lines = [f"  FAILED {each}" for each in self.failed] + [f"  refused {each}" for each in self.refused]
        return "\n".join([f"{self.what}: {counts}", *lines])
