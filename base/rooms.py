"""The rooms of the clone, and whether Python finds them there."""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The folder of the clone."""
ROOMS = (
    "attacks", "base", "data_loader", "evaluation", "experiment", "models", "reports", "studies", "trainer",
)  # fmt: skip
"""The packages that a run imports."""


def check_rooms() -> None:
    """Refuse to begin where another module hides a room, such as a user's own folder `models/` that
    Python finds first.

    Raises:
        ImportError: one line that names both.
    """
    for room in ROOMS:
        spec = find_spec(room)
        if spec is None or spec.origin is None:
            continue
        found, own = Path(spec.origin), ROOT / room
        place = found.parent if found.name == "__init__.py" else found
        if place.resolve() != own.resolve():
            raise ImportError(f"{place}: hides this project's {own}: rename it, or start elsewhere")
