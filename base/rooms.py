"""The packages of this project, and a check that Python imports them from here."""

from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The folder of the clone."""

ROOMS = (
    "attacks",
    "base",
    "data_loader",
    "evaluation",
    "experiment",
    "models",
    "reports",
    "studies",
    "trainer",
)
"""The packages that a run imports."""


def check_rooms() -> None:
    """Check that no other module hides a package of this project.

    The user's own folder `models/`, for example, does so if Python finds it first.

    Raises:
        ImportError: one line that names both.
    """
    for room in ROOMS:
        spec = find_spec(room)
        if spec is None or spec.origin is None:
            continue
        own = ROOT / room
        place = Path(spec.origin)
        if place.name == "__init__.py":
            place = place.parent
        if place.resolve() != own.resolve():
            raise ImportError(f"{place}: hides this project's {own}: rename it, or start elsewhere")
