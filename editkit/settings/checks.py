"""What a setting may be: one clear error for what it may not."""

from editkit.errors import ConfigError


def require(condition: bool, name: str, found: object, wanted: str) -> None:
    """Raise ConfigError unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name} must be {wanted}; found {found}.")


def require_one_of(found: str, name: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError unless `found` is one of `known`."""
    require(found in known, name, repr(found), "one of " + ", ".join(known))
