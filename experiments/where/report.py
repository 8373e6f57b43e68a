from pathlib import Path


def report(work: Path, here: Path) -> None: ...
