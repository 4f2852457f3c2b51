"""Table columns from the attack reports in `eval/` of run folders."""

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from base.errors import ConfigError
from reports.groups import Group, format_setting
from reports.runs import REPORT, AttackReport, check_known

logger = logging.getLogger(__name__)


def attack_columns(groups: Sequence[Group], names: Sequence[str]) -> list[str]:
    """Return the columns of top-1 accuracy under attack that the names select.

    A warning names each unreliable report, and each column in which the attack, its precision or
    the images change from row to row.

    Args:
        groups: rows of the table.
        names: kinds of reports, such as `pgd-20_linf_8_step_2_1_start`; their first words, such as
            `pgd-20` or `pgd`; or patterns with `*` and `?`. Every kind that matches is selected.

    Returns:
        Names as `Run.outcome` takes them.

    Raises:
        ConfigError: a name matches no report of any run, or one row and column holds reports of
            different attacks, precisions or images.
    """
    kinds = list(
        dict.fromkeys(kind for group in groups for run in group.runs for kind in run.reports)
    )
    fitting_none = [name for name in names if not any(_fits(kind, name) for kind in kinds)]
    check_known("--eval", fitting_none, kinds, "no run has such a report in eval/")
    chosen = dict.fromkeys(kind for name in names for kind in kinds if _fits(kind, name))
    for kind in chosen:
        _check_attacks(groups, kind)
    return [f"{REPORT}{kind}.robust_top1" for kind in chosen]


def _fits(kind: str, name: str) -> bool:
    # Whole words only: `pgd-2` does not select `pgd-20`
    begins = kind.startswith(name) and not kind[len(name) :][:1].isalnum()
    return begins or fnmatchcase(kind, name)


def _check_attacks(groups: Sequence[Group], kind: str) -> None:
    in_rows: list[AttackReport] = []
    for group in groups:
        reports = [report for run in group.runs for report in run.reports.get(kind, [])]
        for report in reports:
            if report.values.get("reliable") is False:
                logger.warning("%s: not reliable: a check of the attack failed", report.file)
        # A mean over seeds of the attack is taken within a row, so these must be one attack.
        different = _difference(reports)
        if different:
            raise ConfigError(
                f"--eval {kind}: {different}: one column holds one attack;"
                " move one of them out of eval/"
            )
        in_rows += reports
    # Different attacks in different rows may be what is compared, such as one epsilon per row.
    different = _difference(in_rows)
    if different:
        logger.warning("%s: the attack changes from row to row: %s", kind, different)


def _difference(reports: Sequence[AttackReport]) -> str | None:
    """Describe the first difference between the attacks of reports; None if they are the same."""
    # Reports of older versions lack some keys, so each key has a first report of its own
    firsts: dict[str, tuple[Any, AttackReport]] = {}
    for report in reports:
        for key, value in report.attack.items():
            expected, first = firsts.setdefault(key, (value, report))
            if value != expected:
                return (
                    f"{key} is {format_setting(expected)} in {first.file},"
                    f" but {format_setting(value)} in {report.file}"
                )
    return None
