"""Columns of tables that come from the reports in `eval/` of run folders."""

import logging
from collections.abc import Sequence
from fnmatch import fnmatchcase

from base.errors import ConfigError
from base.registry import did_you_mean
from reports.groups import Group, as_text
from reports.runs import REPORT, AttackReport

logger = logging.getLogger(__name__)


def attack_columns(groups: Sequence[Group], names: Sequence[str]) -> list[str]:
    """The columns of top-1 accuracy under attack that some names stand for, as `Run.outcome` knows
    them.

    A warning names each report whose own checks failed, and columns in which the attack changes
    from row to row.

    Args:
        groups: rows of the table.
        names: kinds of reports, such as `pgd-20_linf_8_step_2_1_start`; the words that they begin
            with, such as `pgd-20` or `pgd`; or patterns with `*` and `?`. All kinds that fit are
            taken.

    Raises:
        ConfigError: a name that fits no report of any run, or reports of one row and column that
            are of different attacks.
    """
    kinds = list(
        dict.fromkeys(kind for group in groups for run in group.runs for kind in run.reports)
    )
    chosen: list[str] = []
    for name in names:
        fitting = [kind for kind in kinds if _fits(kind, name)]
        if not fitting:
            there = ", ".join(kinds) or "none"
            hint = did_you_mean(name, kinds)
            raise ConfigError(
                f"--eval {name}: no run has such a report in eval/; there are: {there}{hint}"
            )
        chosen += fitting
    for kind in dict.fromkeys(chosen):
        _check_attacks(groups, kind)
    return [f"{REPORT}{kind}.robust_top1" for kind in dict.fromkeys(chosen)]


def _fits(kind: str, name: str) -> bool:
    begins = kind.startswith(name) and not kind[len(name) :][:1].isalnum()
    return begins or fnmatchcase(kind, name)


def _check_attacks(groups: Sequence[Group], kind: str) -> None:
    firsts: list[AttackReport] = []
    for group in groups:
        reports = [report for run in group.runs for report in run.reports.get(kind, [])]
        for report in reports:
            if report.values.get("reliable") is False:
                logger.warning("%s: not reliable: a check of the attack failed", report.file)
            different = _difference(reports[0], report)
            if different:
                raise ConfigError(
                    f"--eval {kind}: {different}: one column holds one attack;"
                    " move one of them out of eval/"
                )
        firsts += reports[:1]
    for first in firsts[1:]:
        different = _difference(firsts[0], first)
        if different:
            logger.warning("%s: the attack changes from row to row: %s", kind, different)
            return


def _difference(first: AttackReport, second: AttackReport) -> str | None:
    """The first thing in which two attacks differ; None where they are one."""
    for key, value in first.attack.items():
        other = second.attack[key]
        if value != other:
            return (
                f"{key} is {as_text(value)} in {first.file}, but {as_text(other)} in {second.file}"
            )
    return None
